"""One store into another, without compressing anything again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from softrag.errors import MemoryMismatchError
from softrag.store.collection import id_of
from softrag.store.payload import KEY_FIELD, decode_memory, encode_memory
from softrag.store.points import Points
from softrag.store.qdrant import MemoryStore

if TYPE_CHECKING:
    from qdrant_client import models

# Points read at a time: with memories of 64 KiB, about 6 MB.
PAGE = 64


@dataclass(frozen=True, kw_only=True)
class MigrationReport:
    """What `migrate` did.

    Attributes:
        chunks_copied: Chunks that the target did not have, or not as they are.
        chunks_unchanged: Chunks that it had.
    """

    chunks_copied: int
    chunks_unchanged: int


def migrate(
    source: MemoryStore,
    target: MemoryStore,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> MigrationReport:
    """Copy all chunks of a store into another, with the target's codec.

    Stopped at any point, it can be run again: what the target has already is not sent again. What
    only the target has stays. A codec that keeps fewer bits than the source's loses them for good;
    one that keeps more brings none back.

    Args:
        source: Where chunks are.
        target: Where they go; of the same model and embedder.
        on_progress: Called with the number of chunks looked at so far.

    Raises:
        MemoryMismatchError: The stores belong to different models or embedders.
        MemoryCodecError: A memory of the source is damaged.
        StoreError: One of the stores failed.
    """
    _check_records(source, target)
    copied = unchanged = 0
    for page in source.points.scroll(None, True, batch_size=PAGE, with_vectors=True):
        new = _changed(page, target)
        if new:
            target.write(
                Points(
                    ids=[id_of(record) for record in new],
                    vectors=np.array([record.vector for record in new], dtype=np.float32),
                    payloads=[_payload(record, source, target) for record in new],
                )
            )
        copied += len(new)
        unchanged += len(page) - len(new)
        if on_progress is not None:
            on_progress(copied + unchanged)
    return MigrationReport(chunks_copied=copied, chunks_unchanged=unchanged)


def _check_records(source: MemoryStore, target: MemoryStore) -> None:
    for name in ("fingerprint", "embedder", "dimension"):
        found, expected = getattr(target.record, name), getattr(source.record, name)
        if found != expected:
            raise MemoryMismatchError(
                f"{source.location} is of {name} {expected}, but {target.location} of {found}. "
                "Migrate into a collection that does not exist yet, or one of the same model and "
                "embedder."
            )


def _changed(page: list[models.Record], target: MemoryStore) -> list[models.Record]:
    """Return the records that the target does not have as they are."""
    small = [KEY_FIELD, "title", "metadata"]
    there = target.points.retrieve([id_of(record) for record in page], small)
    stored = {id_of(record): record.payload or {} for record in there}

    def is_same(record: models.Record) -> bool:
        payload = stored.get(id_of(record))
        # The id is of source and text, and the codec is the collection's.
        return payload is not None and all(
            payload.get(name) == (record.payload or {}).get(name) for name in small
        )

    return [record for record in page if not is_same(record)]


def _payload(record: models.Record, source: MemoryStore, target: MemoryStore) -> dict[str, Any]:
    payload = record.payload or {}
    if source.record.codec == target.record.codec:
        return payload
    memory = decode_memory(payload, fingerprint=source.record.fingerprint)
    return payload if memory is None else {**payload, **encode_memory(memory, target.record.codec)}
