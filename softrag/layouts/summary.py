"""What a checkpoint is, as far as its config.json says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A checkpoint of any layout in a few words.

    Attributes:
        layout: Whose files these are, as `model_type` names it.
        decoder: Name or folder of the decoder's base model.
        compressor: The compressor's, or "shared" for the decoder's backbone with adapters.
        rate: Document tokens per soft token.
        memory_tokens: Soft tokens of every document; None when their number follows its length.
        max_document_tokens: The longest document one memory holds.
        query_dependent: Whether documents are compressed for a question.
        fingerprint: Of what decides a memory's values, where the config.json holds it.
    """

    layout: str
    decoder: str | None
    compressor: str | None
    rate: int
    memory_tokens: int | None
    max_document_tokens: int
    query_dependent: bool
    fingerprint: str | None = None
