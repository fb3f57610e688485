"""LangChain's documents from softrag's chunks, and back. It knows no store and no model.

A document's `source` and `title` are metadata in LangChain and fields of their own in softrag. A
document that came from a retriever carries the handle of its memory as metadata, never the memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from langchain_core.documents import Document

from softrag import Chunk, Hit, chunk_id, document_text

HANDLE_FIELD = "softrag_memory"
"""Metadata of a retrieved document that holds its memory's handle."""

RELEVANCE_FIELD = "relevance_score"
"""Metadata with a document's relevance to the question, named as LangChain's rerankers name it."""


def text_of(document: Document) -> str:
    """Return what is compressed of a document: its title, if it has one, and its text."""
    title = document.metadata.get("title")
    return document_text(title if isinstance(title, str) else None, document.page_content)


def to_chunk(document: Document, *, n_tokens: int) -> Chunk:
    """Return a document as a chunk to store.

    Args:
        document: Without an id it gets its content address, as `softrag index` gives it.
        n_tokens: Length in compressor tokens.

    Raises:
        ValueError: Its metadata cannot be stored as JSON.
    """
    metadata = dict(document.metadata)
    metadata.pop(HANDLE_FIELD, None)
    # Only texts have a field of their own; a source that is a number stays what it is.
    source, title = (
        metadata.pop(name) if isinstance(metadata.get(name), str) else None
        for name in ("source", "title")
    )
    _check_json(metadata)
    return Chunk(
        id=document.id or chunk_id(source, document.page_content),
        text=document.page_content,
        source=source,
        title=title,
        metadata=metadata,
        n_tokens=n_tokens,
    )


def to_document(found: Hit | Chunk) -> Document:
    """Return a stored chunk as a document, without its memory."""
    metadata: dict[str, Any] = dict(found.metadata)
    # Whoever wrote it: a stored handle would be one that softrag did not give.
    metadata.pop(HANDLE_FIELD, None)
    if found.source is not None:
        metadata["source"] = found.source
    if found.title is not None:
        metadata["title"] = found.title
    return Document(id=found.id, page_content=found.text, metadata=metadata)


def _check_json(metadata: Mapping[str, Any]) -> None:
    for key, value in metadata.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Metadata {key!r} is a {type(value).__name__} that JSON cannot hold ({error}). "
                "Store a string or a number instead."
            ) from error
