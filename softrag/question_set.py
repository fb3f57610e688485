"""Questions that bring their own documents, answered with a model. It knows no store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from time import perf_counter

from softrag.answer import Mode
from softrag.asking import Asked, Decoding, Source, prepare, split_for
from softrag.compressor import Compressor
from softrag.decoder import Decoder, DecodeResult
from softrag.documents import document_text
from softrag.evaluation import Question
from softrag.memory import Memory


@dataclass(frozen=True, kw_only=True)
class AnsweredSet:
    """A question set answered in one mode.

    Attributes:
        results: One per question, in order.
        text_prompt_tokens: What each prompt would have had with text.
        compress_s: Seconds spent on making memories.
        decode_s: Seconds spent on answering.
    """

    results: list[DecodeResult]
    text_prompt_tokens: list[int]
    compress_s: float
    decode_s: float


def answer_set(
    questions: Sequence[Question],
    *,
    mode: Mode,
    decoder: Decoder,
    compressor: Compressor | None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    on_answers: Callable[[int], None] | None = None,
) -> AnsweredSet:
    """Answer questions from their own documents; each distinct document is compressed once.

    Args:
        questions: The questions.
        mode: What is read of the documents.
        decoder: Answers.
        compressor: Makes memories; needed by mode "memory".
        batch_size: Questions answered together.
        max_new_tokens: Most tokens of an answer.
        on_answers: Called with the number of new answers after every batch.
    """
    texts = [
        [document_text(document.title, document.text) for document in question.documents]
        for question in questions
    ]
    started = perf_counter()
    memories = _compress_all(texts, compressor) if mode == "memory" else {}
    compress_s = perf_counter() - started
    results: list[DecodeResult] = []
    for first in range(0, len(questions), batch_size):
        batch = slice(first, first + batch_size)
        prepared = prepare(
            [
                Asked(question.question, _sources(documents, memories), started)
                for question, documents in zip(questions[batch], texts[batch], strict=True)
            ],
            mode=mode,
            decoding=Decoding(max_new_tokens, None, 0.0, None),
            decoder=decoder,
            compressor=compressor,
        )
        compress_s += prepared[0].compress_s
        results += decoder.generate([each.request for each in prepared])
        if on_answers is not None:
            on_answers(len(prepared))
    decode_s = perf_counter() - started - compress_s
    return AnsweredSet(
        results=results,
        text_prompt_tokens=[
            decoder.prompt_tokens(question.question, documents)
            for question, documents in zip(questions, texts, strict=True)
        ],
        compress_s=compress_s,
        decode_s=decode_s,
    )


def _compress_all(
    texts: Sequence[Sequence[str]], compressor: Compressor | None
) -> dict[str, list[Memory]]:
    """Return every distinct document's memories: one, or several of a document that was split."""
    # Memories for a question are made with it, batch by batch.
    if compressor is None or compressor.query_dependent:
        return {}
    distinct = list(dict.fromkeys(text for documents in texts for text in documents))
    pieces = [split_for(compressor, text) for text in distinct]
    made = iter(compressor.compress([piece for split in pieces for piece in split]))
    return {
        text: list(islice(made, len(split))) for text, split in zip(distinct, pieces, strict=True)
    }


def _sources(documents: Sequence[str], memories: dict[str, list[Memory]]) -> list[Source]:
    sources: list[Source] = []
    for text in documents:
        sources += memories.get(text) or [text]
    return sources
