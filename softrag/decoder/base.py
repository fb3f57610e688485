"""What every decode engine takes and gives. It knows no engine."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from softrag.checks import check_copy_bias, check_count, check_number, check_text, check_texts
from softrag.memory import Memory


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """One question to answer.

    Attributes:
        question: As the user wrote it.
        documents: What to answer from, best first: a memory is read as soft tokens, a string as
            text. Empty: the model answers from what it knows.
        max_new_tokens: Most tokens of the answer.
        stop: Strings that end the answer; they are not part of it.
        temperature: 0.0 takes the likeliest token; above it, up to 1000, tokens are sampled.
        seed: Makes sampling repeatable, any int64; None for a new one each time.
        with_state: Whether the result brings `prompt_state`.
        lookahead: Of so many first tokens the result brings the text as `opening`; 0: none.
        copy_from: Texts that hold the answer's words, such as those the memories were made from.
            They cost no prompt tokens.
        copy_bias: Added to the logits of tokens that go on as one of these texts does, 0.0 to 100;
            0.0 leaves them alone. The log-probabilities of the result are the model's own.
    """

    question: str
    documents: Sequence[Memory | str] = ()
    max_new_tokens: int = 128
    stop: Sequence[str] = ()
    temperature: float = 0.0
    seed: int | None = None
    with_state: bool = False
    lookahead: int = 0
    copy_from: Sequence[str] = ()
    copy_bias: float = 0.0

    def __post_init__(self) -> None:
        """Check what would otherwise fail in the middle of decoding, or not at all."""
        check_text("question", self.question)
        check_texts("documents", self.documents, or_else=(Memory,))
        check_count("max_new_tokens", self.max_new_tokens)
        check_number("temperature", self.temperature, least=0.0, most=1000.0)
        if self.seed is not None:
            check_number("seed", self.seed, least=-(2**63), most=2**63 - 1, whole=True)
        check_number("lookahead", self.lookahead, least=0, whole=True)
        check_texts("copy_from", self.copy_from)
        check_copy_bias(self.copy_bias)
        check_texts("stop", self.stop)
        if not all(self.stop):
            raise ValueError(f"stop must be a list of non-empty strings, found {self.stop!r}.")


@dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """One answer.

    Attributes:
        text: The answer, without what ended it.
        prompt_tokens: Tokens the decoder read, soft tokens included.
        soft_tokens: How many of them were soft.
        completion_tokens: Tokens the decoder wrote, the one that ended the answer included.
        first_token_s: Seconds from the start of the batch to the first token.
        finish_reason: "stop" when the model or a stop string ended it, "length" when
            `max_new_tokens` did.
        token_logprobs: Natural logarithms of the probabilities, at temperature 1, that the model
            gave the tokens it wrote; one per completion token, or empty from a decoder that does
            not say.
        prompt_state: `(hidden,)`, the prompt's last token halfway through the decoder's layers,
            in float32 on the CPU; None unless asked for, or from a decoder that cannot say.
        opening: What the answer's first tokens spell; None unless asked for.
    """

    text: str
    prompt_tokens: int
    soft_tokens: int
    completion_tokens: int
    first_token_s: float
    finish_reason: Literal["stop", "length"]
    token_logprobs: Sequence[float] = ()
    prompt_state: torch.Tensor | None = field(default=None, compare=False, repr=False)
    opening: str | None = None


class Decoder(Protocol):
    """Reads prompts with memories in them and writes answers. Safe to call from several threads."""

    @property
    def fingerprint(self) -> str:
        """Of the compressor whose memories this decoder reads."""
        ...

    @property
    def joins_requests(self) -> bool:
        """Whether requests of separate calls are decoded together as they come.

        If not, it pays to collect questions of the same moment and hand them over in one call.
        """
        ...

    @property
    def copy_bias(self) -> float:
        """What its model's answers from memories are biased by unless told; 0.0 if it cannot."""
        ...

    def prompt_tokens(self, question: str, documents: Sequence[Memory | str]) -> int:
        """Count the prompt's tokens without running the model."""
        ...

    def generate(self, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        """Answer requests together; results in order, the same as one by one.

        Raises:
            MemoryMismatchError: A memory belongs to another model.
            NonFiniteMemoryError: A memory holds NaN or infinity.
            ValueError: A prompt and its answer do not fit the model.
            DecoderError: An engine in another process refused or lost a request.
        """
        ...

    def stream(self, request: DecodeRequest) -> Generator[str, None, DecodeResult]:
        """Answer in pieces of text, and return the result; closing the generator stops the model.

        Raises:
            MemoryMismatchError: A memory belongs to another model.
            NonFiniteMemoryError: A memory holds NaN or infinity.
            ValueError: The prompt and its answer do not fit the model.
            DecoderError: An engine in another process refused or lost the request.
        """
        ...

    def close(self) -> None:
        """Free what the decoder holds; it answers no more. Closing twice is no error."""
        ...
