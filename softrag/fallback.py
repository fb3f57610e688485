"""Answers from memories, and from text where a router says so. It knows no store.

The decision is the same for a question asked alone, in a batch or as a stream: it depends on the
prompt and on the answer's first tokens. Both readings are counted in the answer's usage.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from time import perf_counter

from softrag.answer import Answer
from softrag.asking import Prepared
from softrag.decoder import Decoder, DecodeRequest, DecodeResult
from softrag.router import Router

Generate = Callable[[Sequence[DecodeRequest]], Sequence[DecodeResult]]


def answer_all(
    prepared: Sequence[Prepared], generate: Generate, router: Router | None
) -> list[Answer]:
    """Answer questions together, in order.

    Args:
        prepared: The questions.
        generate: Answers requests, as `Decoder.generate`.
        router: None for no fallback.

    Raises:
        ValueError: The decoder does not say what the router looks at.
    """
    started = perf_counter()
    results = generate([each.request for each in prepared])
    if router is None:
        return [each.answer(result) for each, result in zip(prepared, results, strict=True)]
    scores = [
        router.score(result, each.question.text, each.texts) if _has_choice(each) else None
        for each, result in zip(prepared, results, strict=True)
    ]
    doubted = [
        place
        for place, score in enumerate(scores)
        if score is not None and router.prefers_text(score)
    ]
    texts = [prepared[place].from_text() for place in doubted]
    spent = perf_counter() - started
    answered = _generate_what_fits(generate, [each.request for each in texts])
    # With the text's result last: it is the answer.
    passes: list[list[DecodeResult]] = [[result] for result in results]
    for place, text in zip(doubted, answered, strict=True):
        if text is not None:
            passes[place].append(_later(text, spent))
    return [
        (each if len(read) == 1 else each.from_text()).answer(*read, fallback_score=score)
        for each, read, score in zip(prepared, passes, scores, strict=True)
    ]


def stream_answer(
    prepared: Prepared, decoder: Decoder, generate: Generate, router: Router | None
) -> Generator[str, None, Answer]:
    """Yield an answer's text and return the answer; arguments and errors as in `answer_all`.

    With a router the first piece waits until memories gave the `Router.lookahead` tokens it decides
    by; an answer that is longer is then read again from its start.
    """
    if router is None or not _has_choice(prepared):
        return prepared.answer((yield from decoder.stream(prepared.request)))
    started = perf_counter()
    request = prepared.request
    n_tokens = min(router.lookahead, request.max_new_tokens)
    seen = generate([replace(request, max_new_tokens=n_tokens)])[0]
    score = router.score(seen, prepared.question.text, prepared.texts)
    spent = perf_counter() - started
    if router.prefers_text(score):
        text = prepared.from_text()
        try:
            result = yield from decoder.stream(text.request)
        except ValueError:  # The text does not fit, and nothing was said yet.
            pass
        else:
            return text.answer(seen, _later(result, spent), fallback_score=score)
    if seen.finish_reason == "stop" or n_tokens == request.max_new_tokens:
        if seen.text:
            yield seen.text
        return prepared.answer(seen, fallback_score=score)
    result = yield from decoder.stream(request)
    return prepared.answer(seen, _later(result, spent), fallback_score=score)


def _has_choice(prepared: Prepared) -> bool:
    """Tell whether memories are read, and could be read as text."""
    known = prepared.text_prompt_tokens is not None
    return prepared.mode == "memory" and known and bool(prepared.request.documents)


def _generate_what_fits(
    generate: Generate, requests: Sequence[DecodeRequest]
) -> list[DecodeResult | None]:
    """Return results, and None for a prompt too long for the decoder: its memories must do."""
    if not requests:
        return []
    try:
        return list(generate(requests))
    except ValueError:
        if len(requests) == 1:
            return [None]
    return [_generate_what_fits(generate, [request])[0] for request in requests]


def _later(result: DecodeResult, seconds: float) -> DecodeResult:
    """Return a result whose first token came after an earlier pass."""
    return replace(result, first_token_s=result.first_token_s + seconds)
