"""Chunks and memories as points, checked, in requests of a good size. It knows no client."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from softrag.documents import Chunk
from softrag.errors import MemoryMismatchError
from softrag.memory import Memory
from softrag.store.connection import qdrant
from softrag.store.payload import MEMORY_FIELD, to_payload
from softrag.store.record import StoreRecord

if TYPE_CHECKING:
    from qdrant_client import models

# A server refuses request bodies over 32 MiB. Half of it keeps one request quick, too.
MAX_REQUEST_BYTES = 16 * 2**20
# Points in one request; also how long one writer holds the embedded store.
MAX_REQUEST_POINTS = 64

# Point ids must be UUIDs; this names the ids made from chunk ids.
_POINT_NAMESPACE = uuid.UUID("6f4d3a6e-6d0c-5d0e-9d49-7a6f66747261")


def point_id(chunk_id: str) -> str:
    """Return the UUID of the point that holds a chunk."""
    return str(uuid.uuid5(_POINT_NAMESPACE, chunk_id))


@dataclass(frozen=True, kw_only=True)
class Points:
    """Points as plain values: what travels to a store, from this process or another.

    Attributes:
        ids: n UUIDs, see `point_id`.
        vectors: Search embeddings, `(n, dimension)` float32.
        payloads: n payloads, see `softrag.store.payload`.
    """

    ids: Sequence[str]
    vectors: np.ndarray
    payloads: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        """Return the number of points."""
        return len(self.ids)

    def requests(self) -> Iterator[list[models.PointStruct]]:
        """Yield the points so that each request stays within a server's limits.

        A point that is larger than them goes alone.
        """
        point_struct = qdrant().models.PointStruct
        batch: list[models.PointStruct] = []
        batch_bytes = 0
        for id_, vector, payload in zip(self.ids, unit(self.vectors), self.payloads, strict=True):
            # json escapes everything beyond ASCII, so its text is never the shorter one; a memory
            # is ASCII, and too long to be escaped for its length. A float32 as a decimal number
            # takes up to 24 characters and a comma.
            memory = payload.get(MEMORY_FIELD) or ""
            rest = json.dumps({**payload, MEMORY_FIELD: ""})
            nbytes = len(rest) + len(memory) + 25 * len(vector)
            is_full = len(batch) == MAX_REQUEST_POINTS or batch_bytes + nbytes > MAX_REQUEST_BYTES
            if batch and is_full:
                yield batch
                batch, batch_bytes = [], 0
            batch.append(point_struct(id=id_, vector=vector.tolist(), payload=payload))
            batch_bytes += nbytes
        if batch:
            yield batch


def make_points(
    record: StoreRecord,
    chunks: Sequence[Chunk],
    embeddings: np.ndarray,
    memories: Sequence[Memory | None],
    *,
    place: str,
) -> Points:
    """Check chunks with their embeddings and memories, and make points of them.

    Args:
        record: Of the store they are meant for.
        chunks: n of them.
        embeddings: `(n, dimension)`.
        memories: n of them; None where there is none to store.
        place: Names the store in errors.

    Raises:
        NonFiniteMemoryError: A memory holds NaN or infinity.
        MemoryMismatchError: A memory was made by another model.
    """
    vectors = check_embeddings(record, embeddings, rows=len(chunks))
    if len(memories) != len(chunks):
        raise ValueError(f"Found {len(memories)} memories for {len(chunks)} chunks.")
    for memory in memories:
        if memory is not None and memory.fingerprint != record.fingerprint:
            raise MemoryMismatchError(
                f"Memory {memory.key} was made by the model {memory.fingerprint}, but {place} "
                f"holds memories of {record.fingerprint}. Compress with that model, or open a new "
                "store."
            )
    return Points(
        ids=[point_id(chunk.id) for chunk in chunks],
        vectors=vectors,
        payloads=[
            to_payload(chunk, memory, record.codec)
            for chunk, memory in zip(chunks, memories, strict=True)
        ],
    )


def check_embeddings(record: StoreRecord, embeddings: np.ndarray, *, rows: int) -> np.ndarray:
    """Return embeddings as `(rows, dimension)` float32, or say what is wrong with them."""
    vectors = np.asarray(embeddings, dtype=np.float32)
    if rows == 0 and vectors.size == 0:
        return vectors.reshape(0, record.dimension)
    if vectors.shape != (rows, record.dimension):
        raise ValueError(
            f"Search embeddings have shape {vectors.shape}; expected {(rows, record.dimension)}. "
            f"Use the embedder {record.embedder}."
        )
    if not np.isfinite(vectors).all():
        rows_affected = np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist()
        raise ValueError(f"Search embeddings {rows_affected} hold NaN or infinity.")
    return vectors


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return `(n, dimension)` vectors with length 1, whose products are cosines."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    # What has no direction is near to nothing.
    return vectors / np.where(lengths > 0, lengths, 1)
