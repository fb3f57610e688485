"""What travels between files, the store and the answer. It knows nothing of models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softrag.memory import Memory

MetadataValue = str | int | float | bool | list[str]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text to be split, compressed and stored.

    Attributes:
        text: The text itself.
        source: Where it comes from (a path, URL or any id); what replaces and deletes it.
        title: Shown with answers.
        metadata: Flat values to filter on.
    """

    text: str
    source: str | None = None
    title: str | None = None
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what would otherwise fail while a batch of documents is stored."""
        for name, kind in (
            ("text", str),
            ("source", str | None),
            ("title", str | None),
            ("metadata", Mapping),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind):
                expected = "a mapping" if kind is Mapping else "a string"
                raise TypeError(f"A document's {name} must be {expected}, found {value!r:.80}.")
        try:
            json.dumps(dict(self.metadata))
        except (TypeError, ValueError) as error:
            raise TypeError(
                "A document's metadata must hold strings, numbers, booleans and lists of strings, "
                f"found {dict(self.metadata)!r:.80} ({error}). Turn the others into such: str(…)."
            ) from error


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of a document that fits the compressor: one memory, one point in the store.

    Attributes:
        id: Content address, see `chunk_id`.
        text: The piece's text.
        source: As in `Document`.
        title: As in `Document`.
        metadata: As in `Document`.
        n_tokens: Length in compressor tokens.
        start: Character offset of the piece in its document.
    """

    id: str
    text: str
    source: str | None = None
    title: str | None = None
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)
    n_tokens: int
    start: int = 0


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A stored chunk as found by a search.

    Attributes:
        id: The chunk's content address.
        text: The chunk's text.
        source: As in `Document`.
        title: As in `Document`.
        metadata: As in `Document`.
        score: Similarity to the question; higher is better. 0.0 when fetched by id.
        n_tokens: Length in compressor tokens.
        start: Character offset of the chunk in its document.
        memory: The chunk's soft tokens, or None when they were not asked for.
        relevance: To the question, from 0 to 1, by a model with a rerank head; else None.
    """

    id: str
    text: str
    source: str | None = None
    title: str | None = None
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict)
    score: float = 0.0
    n_tokens: int = 0
    start: int = 0
    memory: Memory | None = None
    relevance: float | None = None


def chunk_id(source: str | None, text: str) -> str:
    """Return the content address of a chunk, 32 hex digits: same source and text, same id."""
    digest = blake2b(digest_size=16)
    # Lengths first, so that ("ab", "c") and ("a", "bc") differ.
    for part in (source or "", text):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def document_text(title: str | None, text: str) -> str:
    r"""Return a chunk as it is embedded and compressed: its title on a line of its own.

    >>> document_text("Paris", "The capital of France.")
    'Paris\nThe capital of France.'
    >>> document_text(None, "The capital of France.")
    'The capital of France.'
    """
    return f"{title}\n{text}" if title else text
