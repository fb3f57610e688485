"""What the engine gives back: answers, their costs, and reports. It knows no model."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Literal

from softrag.documents import Hit

Mode = Literal["memory", "mixed", "text", "closed"]
"""What the decoder reads of the retrieved chunks: their memories, the text of the best and the
memories of the others, their text, or nothing."""


def reads_memories(mode: Mode) -> bool:
    """Tell whether a mode reads memories of some of the chunks at least."""
    return mode in ("memory", "mixed")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What an answer cost, in decoder tokens.

    Attributes:
        prompt_tokens: Read by the decoder, soft tokens included.
        soft_tokens: How many of them were soft.
        text_prompt_tokens: What the same prompt would have had with the chunks as text; None when
            a memory came without its text.
        completion_tokens: Written by the decoder.

    Where a question was read from memories and then from text, both readings are counted.
    """

    prompt_tokens: int
    soft_tokens: int
    text_prompt_tokens: int | None
    completion_tokens: int


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Where the time of an answer went, in seconds.

    Attributes:
        retrieve_s: Embedding the question and searching the store.
        compress_s: Making memories that the store did not have.
        first_token_s: The decoder's time to its first token.
        total_s: Everything, from the question to the whole answer.
    """

    retrieve_s: float
    compress_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer with its sources and costs.

    Attributes:
        text: The answer.
        sources: The chunks it was made from, best first.
        usage: Its cost in tokens.
        timings: Its cost in seconds.
        mode: What the decoder read of the sources; "text" where memories were asked for and the
            fallback decided against them.
        finish_reason: "stop" when the model or a stop string ended it, "length" when
            `max_new_tokens` did.
        fallback_score: What the fallback expects text to be better by than memories, in percent of
            the quality it was calibrated on; None where no fallback decided.
    """

    text: str
    sources: list[Hit]
    usage: Usage
    timings: Timings
    mode: Mode
    finish_reason: Literal["stop", "length"]
    fallback_score: float | None = None


@dataclass(frozen=True, kw_only=True)
class AddError:
    """A document that was left out.

    Attributes:
        source: The document's source; None when it has none.
        message: Why.
    """

    source: str | None
    message: str


@dataclass(frozen=True, kw_only=True)
class AddReport:
    """What `SoftRAG.add` did.

    Attributes:
        documents: Documents read, without those in `errors`.
        chunks_added: Chunks compressed and stored.
        chunks_unchanged: Chunks that the store had already.
        chunks_deleted: Chunks of the same sources that are no longer in them.
        seconds: How long it took.
        errors: Documents that were left out.
    """

    documents: int
    chunks_added: int
    chunks_unchanged: int
    chunks_deleted: int
    seconds: float
    errors: list[AddError]

    @property
    def chunks_per_second(self) -> float:
        """Chunks compressed and stored each second."""
        return self.chunks_added / max(self.seconds, 1e-9)

    def cost_per_million(self, price_per_hour: float) -> float:
        """Return what a million chunks cost at this speed.

        Args:
            price_per_hour: Of all machines that worked, in any currency.

        Raises:
            ValueError: No chunk was added, so there is no speed.
        """
        if not self.chunks_added:
            raise ValueError("No chunk was compressed, so there is no speed to go by.")
        return price_per_hour * 1_000_000 / self.chunks_per_second / 3600


class AnswerStream(Iterator[str]):
    """An answer in pieces of text; `answer` has the whole once they are read.

    Stop early with `close`, or leave a `with` block: the model stops too.

    Attributes:
        sources: The chunks the answer is made from, known before its first word.
    """

    def __init__(self, pieces: Generator[str, None, Answer], sources: list[Hit]) -> None:
        self.sources = sources
        self._pieces = pieces
        self._answer: Answer | None = None

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            RuntimeError: The stream was not read to its end.
        """
        if self._answer is None:
            raise RuntimeError("The answer is not complete: read the stream to its end first.")
        return self._answer

    def __next__(self) -> str:
        """Return the next piece."""
        try:
            return next(self._pieces)
        except StopIteration as end:
            # An exhausted generator stops again without a value.
            if end.value is not None:
                self._answer = end.value
            raise StopIteration from None

    def close(self) -> None:
        """Stop the model; what was not read is lost."""
        self._pieces.close()

    def __enter__(self) -> AnswerStream:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the model if it still runs."""
        self.close()
