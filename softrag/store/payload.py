"""A chunk and its memory as the payload of a Qdrant point, and back. It knows no client.

text, source, title, chunk_id, n_tokens, start
metadata          {...}, what users filter on
softrag_key       the memory's content address
softrag_memory    base64 of the encoded memory: the one large field, at the top level so that
                  a search can leave it out and other readers of the collection can skip it
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from softrag.codec import decode, encode
from softrag.documents import Chunk, Hit, document_text
from softrag.errors import MemoryCodecError
from softrag.memory import Memory

KEY_FIELD = "softrag_key"
MEMORY_FIELD = "softrag_memory"


def encode_memory(memory: Memory, codec: str = "bf16") -> dict[str, str]:
    """Return the two payload fields that hold a memory."""
    blob = base64.b64encode(encode(memory, codec)).decode("ascii")
    return {KEY_FIELD: memory.key, MEMORY_FIELD: blob}


def decode_memory(payload: Mapping[str, Any], *, fingerprint: str | None = None) -> Memory | None:
    """Return the memory in a payload, or None when there is none.

    Raises:
        MemoryCodecError: The memory is damaged or foreign.
        MemoryMismatchError: It belongs to another model than `fingerprint`.
    """
    blob = payload.get(MEMORY_FIELD)
    if blob is None:
        return None
    try:
        return decode(base64.b64decode(blob, validate=True), fingerprint=fingerprint)
    except (TypeError, ValueError, MemoryCodecError) as error:
        raise MemoryCodecError(
            f"Memory {payload.get(KEY_FIELD)} of chunk {payload.get('chunk_id')}, source "
            f"{payload.get('source')!r}, cannot be read: {error}"
        ) from error


def memory_of(payload: Mapping[str, Any], *, fingerprint: str | None = None) -> Memory | None:
    """Return the memory in the payload of a chunk, with its text; errors as in `decode_memory`."""
    memory = decode_memory(payload, fingerprint=fingerprint)
    if memory is None:
        return None
    return replace(memory, text=document_text(payload.get("title"), payload.get("text") or ""))


def to_payload(chunk: Chunk, memory: Memory | None, codec: str = "bf16") -> dict[str, Any]:
    """Return the payload of the point that holds a chunk and its memory."""
    return {
        "text": chunk.text,
        "source": chunk.source,
        "title": chunk.title,
        "metadata": dict(chunk.metadata),
        "chunk_id": chunk.id,
        "n_tokens": chunk.n_tokens,
        "start": chunk.start,
        **(encode_memory(memory, codec) if memory is not None else {}),
    }


def to_hit(
    payload: Mapping[str, Any],
    *,
    point_id: str,
    score: float = 0.0,
    fingerprint: str | None = None,
) -> Hit:
    """Return a point as a hit, with its memory when the payload brings one.

    Args:
        payload: As `to_payload` makes it; what is missing gets `Hit`'s default.
        point_id: Used as the id of a chunk that another writer gave none.
        score: Of the search.
        fingerprint: Of the model that will read the memory.
    """
    return Hit(
        id=payload.get("chunk_id") or point_id,
        text=payload.get("text") or "",
        source=payload.get("source"),
        title=payload.get("title"),
        metadata=payload.get("metadata") or {},
        score=score,
        n_tokens=payload.get("n_tokens") or 0,
        start=payload.get("start") or 0,
        memory=memory_of(payload, fingerprint=fingerprint),
    )
