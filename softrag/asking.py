"""From a question and its chunks to a decoder request, and from its result to an answer.

It knows no store: what was retrieved is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import NamedTuple, get_args

from softrag.answer import Answer, Mode, Timings, Usage, reads_memories
from softrag.checks import check_text, check_texts
from softrag.compressor import Compressor
from softrag.decoder import Decoder, DecodeRequest, DecodeResult
from softrag.documents import Hit, document_text
from softrag.errors import EmptyDocumentError
from softrag.memory import Memory
from softrag.text import split_text

Source = Hit | Memory | str
"""What an answer can be made from: a retrieved chunk, a memory, or a text."""


class Decoding(NamedTuple):
    """How to write answers; the fields are those of `DecodeRequest`."""

    max_new_tokens: int
    stop: Sequence[str] | None
    temperature: float
    seed: int | None
    with_state: bool = False
    lookahead: int = 0
    copy_bias: float = 0.0


class Asked(NamedTuple):
    """A question with what was found for it.

    Attributes:
        text: As the user wrote it.
        sources: What to answer from, best first.
        started: `perf_counter` when it was asked.
        retrieve_s: Seconds it took to find the sources.
        keep: How many of the sources to answer from: those most relevant by the compressor's
            rerank head, best first. None: all, in their order.
    """

    text: str
    sources: Sequence[Source]
    started: float
    retrieve_s: float = 0.0
    keep: int | None = None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A question with everything the decoder needs."""

    request: DecodeRequest
    question: Asked
    mode: Mode
    text_prompt_tokens: int | None
    compress_s: float

    @property
    def hits(self) -> list[Hit]:
        """The sources that are stored chunks."""
        return [source for source in self.question.sources if isinstance(source, Hit)]

    @property
    def texts(self) -> list[str]:
        """The sources' texts.

        Raises:
            ValueError: A memory came without its text.
        """
        return [_text(source) for source in self.question.sources]

    def from_text(self) -> Prepared:
        """Return the same question, to be answered from its sources' texts.

        Raises:
            ValueError: A memory came without its text.
        """
        request = replace(
            self.request,
            documents=tuple(self.texts),
            with_state=False,
            lookahead=0,
            copy_from=(),
            copy_bias=0.0,
        )
        return replace(self, mode="text", request=request)

    def answer(self, *passes: DecodeResult, fallback_score: float | None = None) -> Answer:
        """Return the answer with its sources and costs; the clock stops here.

        Args:
            passes: What the decoder did, at least one; the last is the answer, all are paid for.
            fallback_score: As in `Answer`.
        """
        result = passes[-1]
        return Answer(
            text=result.text,
            sources=self.hits,
            usage=Usage(
                prompt_tokens=sum(each.prompt_tokens for each in passes),
                soft_tokens=sum(each.soft_tokens for each in passes),
                text_prompt_tokens=self.text_prompt_tokens,
                completion_tokens=sum(each.completion_tokens for each in passes),
            ),
            timings=Timings(
                retrieve_s=self.question.retrieve_s,
                compress_s=self.compress_s,
                first_token_s=result.first_token_s,
                total_s=perf_counter() - self.question.started,
            ),
            mode=self.mode,
            finish_reason=result.finish_reason,
            fallback_score=fallback_score,
        )


def check_mode(mode: str) -> None:
    """Refuse a mode that does not exist."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}; found {mode!r}.")


def check_question(question: object) -> None:
    """Refuse what is no question, before anything is made of it.

    Raises:
        TypeError: It is no text.
        ValueError: It is blank, or no valid Unicode.
    """
    if not isinstance(question, str):
        raise TypeError(
            f"A question must be a string, found {question!r:.80}. Ask several with ask_many."
        )
    check_text("The question", question)
    if not question.strip():
        raise ValueError("The question is blank; expected some text.")


def prepare(
    questions: Sequence[Asked],
    *,
    mode: Mode,
    decoding: Decoding,
    decoder: Decoder,
    compressor: Compressor | None,
) -> list[Prepared]:
    """Turn questions into decoder requests; missing memories are made, all in one go.

    Raises:
        EmptyDocumentError: A source has no text.
        ValueError: A question is blank, or a memory is missing and there is no compressor, or a
            memory came without the text that mode "text" reads.
    """
    check_mode(mode)
    for question in questions:
        check_question(question.text)
        check_texts("sources", question.sources, or_else=(Hit, Memory))
    started = perf_counter()
    documents: list[list[Memory | str]]
    if reads_memories(mode):
        questions, documents = _compressed(questions, mode, compressor)
    elif mode == "text":
        documents = [[_text(source) for source in question.sources] for question in questions]
    else:
        documents = [[] for _ in questions]
    compress_s = perf_counter() - started
    # What reads the texts themselves needs no help with their words.
    copies = decoding.copy_bias > 0 and reads_memories(mode)
    return [
        Prepared(
            request=DecodeRequest(
                question=question.text,
                documents=tuple(read),
                max_new_tokens=decoding.max_new_tokens,
                stop=() if decoding.stop is None else decoding.stop,
                temperature=decoding.temperature,
                seed=decoding.seed,
                with_state=decoding.with_state,
                lookahead=decoding.lookahead,
                copy_from=_known_texts(question) if copies else (),
                copy_bias=decoding.copy_bias if copies else 0.0,
            ),
            question=question,
            mode=mode,
            text_prompt_tokens=_text_prompt_tokens(question, mode, decoder),
            compress_s=compress_s if reads_memories(mode) else 0.0,
        )
        for question, read in zip(questions, documents, strict=True)
    ]


def _compressed(
    questions: Sequence[Asked], mode: Mode, compressor: Compressor | None
) -> tuple[list[Asked], list[list[Memory | str]]]:
    """Return the questions, reranked, with what is read for each: memories, the best as text."""
    # A rerank head has to see the best source to know it; else that one needs no memory.
    n_texts = 1 if mode == "mixed" else 0
    n_unseen = 0 if compressor is not None and compressor.reranks else n_texts
    seen = [question._replace(sources=question.sources[n_unseen:]) for question in questions]
    made = zip(seen, _memories(seen, compressor), strict=True)
    ranked = [_rerank(question, memories) for question, memories in made]
    asked: list[Asked] = []
    documents: list[list[Memory | str]] = []
    for question, (reranked, parts) in zip(questions, ranked, strict=True):
        sources = [*question.sources[:n_unseen], *reranked.sources]
        asked.append(question._replace(sources=sources))
        memories = [memory for part in parts[n_texts - n_unseen :] for memory in part]
        documents.append([*map(_text, sources[:n_texts]), *memories])
    return asked, documents


def _memories(
    questions: Sequence[Asked], compressor: Compressor | None
) -> list[list[list[Memory]]]:
    """Return the memories of every question's every source, making those that are missing."""
    pieces: list[str] = []
    asked: list[str] = []
    plan: list[list[Memory | slice]] = []
    for question in questions:
        steps: list[Memory | slice] = []
        for source in question.sources:
            memory = source.memory if isinstance(source, Hit) else source
            if isinstance(memory, Memory):
                steps.append(memory)
                continue
            split = split_for(compressor, _text(source))
            steps.append(slice(len(pieces), len(pieces) + len(split)))
            pieces += split
            asked += [question.text] * len(split)
        plan.append(steps)
    made: list[Memory] = []
    if pieces and compressor is not None:
        made = compressor.compress(pieces, asked if compressor.query_dependent else None)
    return [
        [[step] if isinstance(step, Memory) else made[step] for step in steps] for steps in plan
    ]


def _rerank(question: Asked, memories: list[list[Memory]]) -> tuple[Asked, list[list[Memory]]]:
    """Note how relevant each source is; keep the best where the question says how many."""
    relevance = [
        max((memory.relevance for memory in each if memory.relevance is not None), default=None)
        for each in memories
    ]
    sources = [
        replace(source, relevance=value)
        if isinstance(source, Hit) and value is not None
        else source
        for source, value in zip(question.sources, relevance, strict=True)
    ]
    order = list(range(len(sources)))
    if question.keep is not None:
        # Stable: equally relevant sources stay in the order they were found in.
        order = sorted(order, key=lambda place: -(relevance[place] or 0.0))[: question.keep]
    return (
        question._replace(sources=[sources[place] for place in order]),
        [memories[place] for place in order],
    )


def split_for(compressor: Compressor | None, text: str) -> list[str]:
    """Return a text in pieces that the compressor reads whole."""
    if compressor is None:
        raise ValueError(
            "A source has no memory and no compressor is loaded to make it. Load with "
            "load_compressor=True, or ask in mode 'text'."
        )
    if not text.strip():
        raise EmptyDocumentError("A source has no text, so there is nothing to compress.")
    limit = compressor.model.config.max_document_tokens
    if compressor.cut or len(compressor.prompt.tokenize(text)) <= limit:
        return [text]
    return [piece.text for piece in split_text(text, compressor.prompt.tokenizer, limit)]


def _text(source: Source) -> str:
    text = _known_text(source)
    if text is None:
        assert isinstance(source, Memory)
        raise ValueError(
            f"Memory {source.key} came without its text. Pass the hit that holds both, or ask in "
            "mode 'memory'."
        )
    return text


def _known_text(source: Source) -> str | None:
    if isinstance(source, Hit):
        return document_text(source.title, source.text)
    return source if isinstance(source, str) else source.text


def _known_texts(question: Asked) -> list[str]:
    return [text for source in question.sources if (text := _known_text(source)) is not None]


def _text_prompt_tokens(question: Asked, mode: Mode, decoder: Decoder) -> int | None:
    """Count what the prompt would have cost with text; None when a text is not known."""
    if mode == "closed":
        return decoder.prompt_tokens(question.text, [])
    texts = _known_texts(question)
    if len(texts) < len(question.sources):
        return None
    return decoder.prompt_tokens(question.text, texts)
