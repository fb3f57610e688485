"""A memory: the soft tokens of one document, and its address. It knows no model and no store."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import torch


@dataclass(frozen=True, kw_only=True, eq=False)
class Memory:
    """The soft tokens of one document.

    Attributes:
        values: `(memory, hidden)` floating point tensor on the CPU; `hidden` is the decoder's.
        key: Content address, see `memory_key`.
        fingerprint: Of everything that decided the values (`SoftRAGModel.fingerprint`).
        n_document_tokens: How many compressor tokens the document had.
        relevance: How relevant the document is to the question, from 0 to 1, by a query-dependent
            model with a rerank head; None by others, and when read from a store.
        text: What the values were made from; None where that is not known, as in bytes
            (`softrag.codec`).
    """

    values: torch.Tensor
    key: str
    fingerprint: str
    n_document_tokens: int
    relevance: float | None = None
    text: str | None = None

    def __len__(self) -> int:
        """Return the number of soft tokens."""
        return self.values.shape[0]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return self.values.numel() * self.values.element_size()


def memory_key(fingerprint: str, text: str, question: str | None = None) -> str:
    """Return the content address of a memory, 32 hex digits.

    The same model, text and (for query-dependent models) question give the same key; a change in
    any of them gives another.
    """
    digest = blake2b(digest_size=16)
    # Lengths first, so that no text can imitate the border between two parts.
    for part in (fingerprint, text) if question is None else (fingerprint, text, question):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def is_finite(values: torch.Tensor) -> bool:
    """Tell whether no value is NaN or infinite."""
    # A finite sum has finite summands, and costs a twentieth of looking at each of them; a sum
    # that is not may still come of large ones.
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())
