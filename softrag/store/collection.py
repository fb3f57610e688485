"""One open Qdrant collection: points in, points out, for many threads. It knows no chunks."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import RLock
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from softrag.errors import StoreError
from softrag.store.connection import is_url, store_errors
from softrag.store.embedded import open_database, sync
from softrag.store.points import Points

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models

    PayloadFields: TypeAlias = bool | list[str] | models.PayloadSelectorExclude

# Ids or keys in one lookup, so that an answer with memories stays small.
MAX_LOOKUP = 256


class Collection:
    """A collection and the client that reaches it.

    Attributes:
        client: The Qdrant client.
        lock: Held around every use of `client`: the embedded one is not thread-safe.
        location: `":memory:"`, a folder or a URL.
        name: Of the collection.
        is_server: Whether `location` is a URL.
    """

    def __init__(self, client: QdrantClient, *, location: str, name: str) -> None:
        self.client = client
        self.location = location
        self.name = name
        self.is_server = is_url(location)
        self.lock: AbstractContextManager[object] = nullcontext() if self.is_server else RLock()
        # Also closes a forgotten store when the program ends: the client would do so too late, and
        # complain about it.
        self._close_client = weakref.finalize(self, client.close)
        self._database = None if self.is_server else open_database(client, name)

    def close(self) -> None:
        """Let go of the folder or the connection. Closing twice does nothing."""
        with self.lock:
            self._close_client()

    @contextmanager
    def using(self, doing: str) -> Iterator[QdrantClient]:
        """Give the client to one thread at a time, and its errors softrag's names."""
        with self.lock, store_errors(doing, self.location):
            if not self._close_client.alive:
                raise StoreError(f"{doing} failed: the store {self.location} is closed.")
            yield self.client

    def upsert(self, points: Points) -> None:
        """Store points, acknowledged request by request."""
        for batch in points.requests():
            with self.using("Storing chunks") as client:
                client.upsert(self.name, points=batch, wait=True)
                self.sync()

    def delete(self, ids: Sequence[str]) -> None:
        """Delete points; unknown ids are ignored."""
        for batch in slices(ids, MAX_LOOKUP):
            with self.using("Deleting chunks") as client:
                client.delete(self.name, list(batch), wait=True)
                self.sync()

    def retrieve(self, ids: Sequence[str], fields: PayloadFields) -> list[models.Record]:
        """Return points by id, in no particular order; unknown ids are left out."""
        records: list[models.Record] = []
        for batch in slices(ids, MAX_LOOKUP):
            with self.using("Fetching chunks") as client:
                records += client.retrieve(self.name, list(batch), with_payload=fields)
        return records

    def query(
        self,
        vector: np.ndarray,
        k: int,
        *,
        query_filter: models.Filter | None,
        fields: PayloadFields,
    ) -> list[models.ScoredPoint]:
        """Return the `k` points nearest to a vector, best first."""
        with self.using("Searching") as client:
            return client.query_points(
                self.name,
                query=vector.tolist(),
                query_filter=query_filter,
                limit=k,
                with_payload=fields,
            ).points

    def scroll(
        self,
        query_filter: models.Filter | None,
        fields: PayloadFields,
        *,
        batch_size: int = 4096,
        with_vectors: bool = False,
    ) -> Iterator[list[models.Record]]:
        """Yield points page by page; the lock is free in between."""
        offset = None
        while True:
            with self.using("Reading chunks") as client:
                records, offset = client.scroll(
                    self.name,
                    scroll_filter=query_filter,
                    limit=batch_size,
                    offset=offset,
                    with_payload=fields,
                    with_vectors=with_vectors,
                )
            yield records
            if offset is None:
                return

    def count(self, query_filter: models.Filter | None) -> int:
        """Return how many points match; None counts all."""
        with self.using("Counting") as client:
            return client.count(self.name, count_filter=query_filter, exact=True).count

    def sync(self) -> None:
        """Make everything stored survive a power cut; on a server, that is the server's part."""
        if self._database is not None:
            sync(self._database)


def slices(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Yield the items in runs of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))


def id_of(point: models.Record | models.ScoredPoint) -> str:
    """Return a point's id as text."""
    found: int | str | uuid.UUID = point.id
    return str(found)
