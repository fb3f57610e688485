"""What memories and prompts must be before a decoder is asked. It knows no engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softrag.errors import MemoryMismatchError, NonFiniteMemoryError
from softrag.memory import Memory, is_finite

if TYPE_CHECKING:
    from softrag.decoder.base import DecodeRequest


def check_memory(memory: Memory, *, fingerprint: str, width: int) -> None:
    """Refuse a memory that a decoder must not read.

    Args:
        memory: What is to be read.
        fingerprint: Of the compressor whose memories the decoder reads.
        width: The decoder's hidden size.

    Raises:
        MemoryMismatchError: The memory belongs to another model.
        NonFiniteMemoryError: The memory holds NaN or infinity.
    """
    if memory.fingerprint != fingerprint:
        raise MemoryMismatchError(
            f"Memory {memory.key} was made by compressor {memory.fingerprint}, but this decoder "
            f"reads {fingerprint}. Compress the documents again with the loaded model, or load "
            "the model the memory was made with."
        )
    values = memory.values
    if values.ndim != 2 or not len(values) or values.shape[1] != width:
        raise MemoryMismatchError(
            f"Memory {memory.key} has values of shape {tuple(values.shape)}; this decoder reads "
            f"(memory, {width}) with at least one soft token. Compress its document again."
        )
    if not values.is_floating_point():
        raise MemoryMismatchError(
            f"Memory {memory.key} has {values.dtype} values; expected floating point numbers. "
            "Compress its document again."
        )
    # Checked here as well as when it is made: one NaN in a batch or a shared cache can spoil
    # answers that have nothing to do with it.
    if not is_finite(values):
        raise NonFiniteMemoryError(
            f"Memory {memory.key} holds NaN or infinity. Compress its document again."
        )


def check_fits(request: DecodeRequest, *, prompt_tokens: int, limit: int | None) -> None:
    """Refuse a request whose prompt and answer are longer than a decoder reads.

    Args:
        request: Says how long its answer may be.
        prompt_tokens: Of its prompt.
        limit: Most tokens that the decoder reads; None: no limit is known.

    Raises:
        ValueError: They do not fit.
    """
    if limit is not None and prompt_tokens + request.max_new_tokens > limit:
        raise ValueError(
            f"The prompt has {prompt_tokens} tokens and the answer may have "
            f"{request.max_new_tokens}, but the decoder reads {limit}. Shorten the question, ask "
            "with fewer or shorter documents, or lower max_new_tokens."
        )
