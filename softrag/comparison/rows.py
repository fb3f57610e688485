"""One row per way of answering the same questions, and what the rows say about each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np
import torch

from softrag.answer import Mode, reads_memories
from softrag.comparison.excerpts import excerpt
from softrag.comparison.intervals import Bootstrap, Interval
from softrag.compressor import Compressor
from softrag.decoder import Decoder, DecodeResult, TorchDecoder
from softrag.embedder import Embedder
from softrag.evaluation import Question, score
from softrag.model import SoftRAGModel
from softrag.question_set import (
    SetMemories,
    answer_set,
    compress_set,
    texts_of,
)
from softrag.router import Router

Way = Literal[Mode, "excerpts"]
"""What is compared: the engine's modes, and text that is cut to the length of the memories."""

RIGHT = 50.0
"""A question counts as right from this score on; the metrics that decide are 0 or 100."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to answer.

    Attributes:
        name: Names it in rows; empty where there is only one.
        decoder: Answers.
        compressor: Makes memories; None where no mode needs them.
    """

    name: str
    decoder: Decoder
    compressor: Compressor | None

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        name: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = "auto",
        load_compressor: bool = True,
        batch_size: int = 16,
        rate: int | None = None,
    ) -> LoadedModel:
        """Load a checkpoint; arguments as in `SoftRAGModel.from_pretrained` and `TorchDecoder`."""
        model = SoftRAGModel.from_pretrained(
            checkpoint, device=device, dtype=dtype, load_compressor=load_compressor, rate=rate
        )
        lock = threading.Lock()
        return cls(
            name=name,
            decoder=TorchDecoder(
                model, batch_size=batch_size, batch_tokens=1024 * batch_size, lock=lock
            ),
            compressor=Compressor(model, lock=lock) if load_compressor else None,
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """The questions answered in one way.

    Attributes:
        name: Says which way, such as "text" or "memory int8".
        model: Name of the model; empty where there is only one.
        mode: What was read.
        results: One per question, in order.
        scores: `(questions,)` by metric, in percent.
        compress_s: Seconds per question spent on memories, all of them where a store would have
            had them; or on cutting excerpts.
        decode_s: Seconds per question spent on answering; many were answered together.
        stored_bytes: What is stored per distinct document for this way of reading.
        text_share: Part of the questions that a fallback answered from text; None without one.
        copy_bias: As in `SoftRAG`; 0.0 where no memories are read.
    """

    name: str
    model: str
    mode: Way
    results: Sequence[DecodeResult]
    scores: dict[str, np.ndarray]
    compress_s: float
    decode_s: float
    stored_bytes: float
    text_share: float | None = None
    copy_bias: float = 0.0

    @cached_property
    def prompt_tokens(self) -> np.ndarray:
        """Tokens the decoder read, `(questions,)`."""
        return np.array([result.prompt_tokens for result in self.results], dtype=float)

    def is_right(self) -> np.ndarray:
        """Tell which questions are answered right, `(questions,)`: by the judge, else by match."""
        return self.scores.get("judge", self.scores["match"]) >= RIGHT


def answer_rows(
    questions: Sequence[Question],
    model: LoadedModel,
    *,
    modes: Sequence[Way],
    codecs: Sequence[str] = ("bf16",),
    batch_size: int = 16,
    max_new_tokens: int = 64,
    with_state: bool = False,
    lookahead: int = 0,
    copy_bias: float | None = None,
    embedder: Embedder | None = None,
    on_answers: Callable[[str, int], None] | None = None,
) -> Iterator[Row]:
    """Answer the same questions from the same documents in several ways, and yield the rows.

    Args:
        questions: The questions with their documents, best first as a search has them; where they
            are in no order, `nearest_first` puts them in one.
        model: What answers.
        modes: What to read. Mode "excerpts" needs an embedder and a compressor.
        codecs: Mode "memory" reads memories as stores with these codecs return them, a row each;
            only the first for a query-dependent model, which stores none.
        batch_size: Questions answered together.
        max_new_tokens: Most tokens of an answer.
        with_state: Whether mode "memory" brings the state that a router may look at.
        lookahead: First tokens of whose text mode "memory" brings, for a router.
        copy_bias: As in `SoftRAG`.
        embedder: Finds the sentences of mode "excerpts".
        on_answers: Called with the row's name and the number of new answers.
    """
    distinct = {text for question in questions for text in texts_of(question)}
    memories: SetMemories | None = None
    bias = model.decoder.copy_bias if copy_bias is None else copy_bias
    read_as: dict[Way, Mode] = {way: "text" if way == "excerpts" else way for way in modes}
    if any(map(reads_memories, read_as.values())) and model.compressor is not None:
        memories = compress_set(questions, model.compressor)
    for way, mode in read_as.items():
        started = perf_counter()
        asked = _excerpts(questions, model, embedder) if way == "excerpts" else questions
        cut_s = perf_counter() - started if way == "excerpts" else 0.0
        for codec in codecs if mode == "memory" and memories and memories.by_text else codecs[:1]:
            read = memories.encoded(codec) if memories and reads_memories(mode) else None
            name = _row_name(
                model.name, way, codec if len(codecs) > 1 and read and read.by_text else None
            )
            answered = answer_set(
                asked,
                mode=mode,
                decoder=model.decoder,
                compressor=model.compressor,
                memories=read,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                with_state=with_state and mode == "memory",
                lookahead=lookahead if mode == "memory" else 0,
                copy_bias=bias,
                on_answers=None if on_answers is None else _named(on_answers, name),
            )
            stored = {
                "closed": 0,
                "text": sum(len(text.encode()) for text in distinct),
                "memory": read.nbytes if read else 0,
            }
            stored["mixed"] = stored["memory"] + stored["text"]
            yield Row(
                name=name,
                model=model.name,
                mode=way,
                results=answered.results,
                scores=score_results(questions, answered.results),
                compress_s=(answered.compress_s + cut_s + (read.compress_s if read else 0))
                / len(questions),
                decode_s=answered.decode_s / len(questions),
                stored_bytes=stored[mode] / max(1, len(distinct)),
                copy_bias=bias if reads_memories(mode) else 0.0,
            )


def _excerpts(
    questions: Sequence[Question], model: LoadedModel, embedder: Embedder | None
) -> Sequence[Question]:
    if embedder is None or model.compressor is None:
        raise ValueError(
            "Mode 'excerpts' needs an embedder, which finds the sentences, and a model with its "
            "compressor, which says how long memories are. Give both."
        )
    return excerpt(questions, embedder, model.compressor)


def fall_back(memory: Row, text: Row, router: Router, questions: Sequence[Question]) -> Row:
    """Return the row that memories with a fallback to text give, from both rows' answers.

    Raises:
        ValueError: The memories' results lack what the router looks at.
    """
    scores = [
        router.score(result, question.question, texts_of(question))
        for result, question in zip(memory.results, questions, strict=True)
    ]
    from_text = np.array([router.prefers_text(score) for score in scores], dtype=bool)
    share = float(from_text.mean())
    return Row(
        name=f"{memory.name} + fallback",
        model=memory.model,
        mode="memory",
        results=[
            _both(first, second) if doubted else first
            for first, second, doubted in zip(memory.results, text.results, from_text, strict=True)
        ],
        scores={
            name: np.where(from_text, text.scores[name], memory.scores[name])
            for name in memory.scores
        },
        compress_s=memory.compress_s,
        decode_s=memory.decode_s + share * text.decode_s,
        stored_bytes=memory.stored_bytes + text.stored_bytes,
        text_share=share,
        copy_bias=memory.copy_bias,
    )


def _both(memory: DecodeResult, text: DecodeResult) -> DecodeResult:
    """Return the text's answer at the price of both."""
    return replace(
        text,
        prompt_tokens=memory.prompt_tokens + text.prompt_tokens,
        soft_tokens=memory.soft_tokens,
        completion_tokens=memory.completion_tokens + text.completion_tokens,
    )


def score_results(
    questions: Sequence[Question], results: Sequence[DecodeResult]
) -> dict[str, np.ndarray]:
    """Return `(questions,)` scores by metric; without ROUGE-L where it cannot be had."""
    scored = [
        asdict(score(result.text, question.answers))
        for question, result in zip(questions, results, strict=True)
    ]
    return {
        name: np.array([each[name] for each in scored])
        for name in scored[0]
        if scored[0][name] is not None
    }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows over the same questions.

    Attributes:
        questions: The questions.
        rows: At least one.
        seed: Of the intervals.
    """

    questions: Sequence[Question]
    rows: Sequence[Row]
    seed: int = 0

    @cached_property
    def bootstrap(self) -> Bootstrap:
        """The resamples that all intervals share."""
        return Bootstrap(len(self.questions), seed=self.seed)

    def interval(self, row: Row, metric: str) -> Interval:
        """Return the mean of a row's metric, in percent."""
        return self.bootstrap.interval(row.scores[metric])

    def against_text(self, row: Row, metric: str) -> Interval | None:
        """Return a row's mean less that of its model's text; None without such a row."""
        text = self.text_of(row)
        if text is None or text is row:
            return None
        return self.bootstrap.interval(row.scores[metric] - text.scores[metric])

    def text_of(self, row: Row) -> Row | None:
        """Return the row in which the same model reads text."""
        rows = (each for each in self.rows if each.mode == "text" and each.model == row.model)
        return next(rows, None)

    def lost(self, row: Row) -> np.ndarray:
        """Return the places of the questions that text answers right and this row wrong."""
        text = self.text_of(row)
        if text is None:
            return np.array([], dtype=int)
        return np.flatnonzero(text.is_right() & ~row.is_right())


def _row_name(model: str, mode: str, codec: str | None) -> str:
    return " ".join(part for part in (model and f"{model}:", mode, codec) if part)


def _named(on_answers: Callable[[str, int], None], name: str) -> Callable[[int], None]:
    return lambda n: on_answers(name, n)
