"""MemoryStore: chunks, their search embeddings and memories in one Qdrant collection.

One point per chunk: the search embedding as its vector, everything else as its payload (see
`softrag.store.payload`). It knows no model and no embedder, only their names.
"""

from __future__ import annotations

import json
import logging
import uuid
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from softrag.codec import CODECS
from softrag.documents import Chunk, Hit
from softrag.errors import MemoryMismatchError, StoreError
from softrag.memory import Memory
from softrag.store.connection import (
    GRPC_PORT,
    IN_MEMORY,
    connect,
    create_collection,
    is_url,
    open_database,
    qdrant,
    store_errors,
    sync,
)
from softrag.store.filters import to_filter
from softrag.store.payload import KEY_FIELD, MEMORY_FIELD, decode_memory, to_hit, to_payload
from softrag.store.record import StoreRecord

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models

    from softrag.store.filters import Where

    PayloadFields: TypeAlias = bool | list[str] | models.PayloadSelectorExclude

logger = logging.getLogger(__name__)

# A server refuses request bodies over 32 MiB. Half of it keeps one request quick, too.
MAX_REQUEST_BYTES = 16 * 2**20
# Points in one request; also how long one writer holds the embedded store.
MAX_REQUEST_POINTS = 64
# Ids or keys in one lookup, so that an answer with memories stays small.
MAX_LOOKUP = 256
# The embedded store keeps everything in memory and compares with every point.
LARGE_EMBEDDED_STORE = 20_000

# Point ids must be UUIDs; this names the ids made from chunk ids.
_POINT_NAMESPACE = uuid.UUID("6f4d3a6e-6d0c-5d0e-9d49-7a6f66747261")


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """What a store is and holds.

    Attributes:
        location: `":memory:"`, a folder or a URL.
        collection: Name of the Qdrant collection.
        chunks: How many it holds.
        fingerprint: Of the model whose memories it holds.
        embedder: Name of what makes its search embeddings.
        dimension: Of a search embedding.
        codec: Of its memories.
        bytes_on_disk: Of the collection; None in memory and on a server.
    """

    location: str
    collection: str
    chunks: int
    fingerprint: str
    embedder: str
    dimension: int
    codec: str
    bytes_on_disk: int | None


class MemoryStore:
    """Chunks with their search embeddings and memories. Safe to share between threads.

    Open it with `MemoryStore.open`. Every write is acknowledged: once `upsert` or `delete` has
    returned, its effect survives the death of the process.

    Attributes:
        client: The Qdrant client, for what this class does not offer.
        lock: Hold it around every use of `client`: the embedded client is not thread-safe.
        location: `":memory:"`, a folder or a URL.
        collection: Name of the Qdrant collection.
        record: The model, embedder and codec the collection belongs to.
    """

    def __init__(
        self, client: QdrantClient, *, location: str, collection: str, record: StoreRecord
    ) -> None:
        self.client = client
        self.location = location
        self.collection = collection
        self.record = record
        self._is_server = is_url(location)
        self.lock: AbstractContextManager[object] = nullcontext() if self._is_server else RLock()
        # Also closes a forgotten store when the program ends: the client would do so too late, and
        # complain about it.
        self._close_client = weakref.finalize(self, client.close)
        self._database = None if self._is_server else open_database(client, collection)
        self._has_warned = False
        self._warn_if_large()

    @classmethod
    def open(
        cls,
        location: str | Path,
        *,
        collection: str = "softrag",
        fingerprint: str | None = None,
        embedder: str | None = None,
        dimension: int | None = None,
        codec: str | None = None,
        api_key: str | None = None,
        prefer_grpc: bool = False,
        grpc_port: int = GRPC_PORT,
    ) -> MemoryStore:
        """Open a collection, and create it when there is none.

        Args:
            location: `":memory:"`, a folder (of this process alone; open only folders you trust,
                because the embedded Qdrant keeps its points as pickles), or the `http(s)://` URL
                of a Qdrant server.
            collection: Name of the Qdrant collection.
            fingerprint: Of the model; None takes the recorded one. Needed to create.
            embedder: Name of what makes the search embeddings; None takes the recorded one.
                Needed to create.
            dimension: Of a search embedding; None takes the recorded one. Needed to create.
            codec: Of the memories (see `softrag.codec`); None takes the recorded one, or `"bf16"`
                for a new collection.
            api_key: Of the server.
            prefer_grpc: Talk gRPC instead of HTTP to the server.
            grpc_port: Of the server, on the URL's host.

        Raises:
            MemoryMismatchError: The collection belongs to another model or embedder.
            StoreError: It cannot be opened, created or read.
        """
        if codec is not None and codec not in CODECS:
            raise ValueError(f"Unknown codec {codec!r}. Choose one of {', '.join(CODECS)}.")
        location = str(location)
        place = f"Collection {collection!r} in {location}"
        new = None
        if fingerprint is not None and embedder is not None and dimension is not None:
            new = StoreRecord(
                fingerprint=fingerprint,
                embedder=embedder,
                dimension=dimension,
                codec=codec or "bf16",
            )
        with store_errors("Opening", location):
            # Only looking must leave no folder behind.
            if new is None and not is_url(location) and not Path(location).exists():
                raise _missing(place)
            client = connect(
                location, api_key=api_key, prefer_grpc=prefer_grpc, grpc_port=grpc_port
            )
            try:
                if not client.collection_exists(collection):
                    if new is None:
                        raise _missing(place)
                    create_collection(
                        client,
                        collection,
                        dimension=new.dimension,
                        metadata=new.to_metadata(),
                        # The embedded store has no indexes, and would warn.
                        indexed_fields=("source", KEY_FIELD) if is_url(location) else (),
                    )
                record = StoreRecord.from_metadata(
                    client.get_collection(collection).config.metadata, place=place
                )
                record.check(
                    place=place,
                    fingerprint=fingerprint,
                    embedder=embedder,
                    dimension=dimension,
                    codec=codec,
                )
                return cls(client, location=location, collection=collection, record=record)
            except BaseException:
                client.close()
                raise

    def close(self) -> None:
        """Let go of the folder or the connection. Closing twice does nothing."""
        with self.lock:
            self._close_client()

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # Writing

    def upsert(
        self, chunks: Sequence[Chunk], embeddings: np.ndarray, memories: Sequence[Memory | None]
    ) -> None:
        """Store chunks; one with a known id replaces the old one.

        Everything is checked before anything is stored. When the storage fails half-way (a full
        disk, a lost server) part of the chunks may be stored, each of them whole; storing them
        again completes it.

        Args:
            chunks: n of them.
            embeddings: `(n, dimension)`.
            memories: n of them; None where there is none to store, as for query-dependent models.

        Raises:
            NonFiniteMemoryError: A memory holds NaN or infinity.
            MemoryMismatchError: A memory was made by another model.
            StoreError: The storage failed.
        """
        vectors = self._check_embeddings(embeddings, rows=len(chunks))
        if len(memories) != len(chunks):
            raise ValueError(f"Found {len(memories)} memories for {len(chunks)} chunks.")
        for memory in memories:
            if memory is not None and memory.fingerprint != self.record.fingerprint:
                raise MemoryMismatchError(
                    f"Memory {memory.key} was made by the model {memory.fingerprint}, but "
                    f"{self.location} holds memories of {self.record.fingerprint}. Compress with "
                    "that model, or open a new store."
                )
        models = qdrant().models
        points = [
            models.PointStruct(
                id=point_id(chunk.id),
                vector=vector.tolist(),
                payload=to_payload(chunk, memory, self.record.codec),
            )
            for chunk, vector, memory in zip(chunks, vectors, memories, strict=True)
        ]
        for batch in _request_batches(points, dimension=self.record.dimension):
            with self._using("Storing chunks") as client:
                client.upsert(self.collection, points=batch, wait=True)
                self._sync()
        self._warn_if_large()

    def delete(self, ids: Collection[str]) -> int:
        """Delete chunks by id; unknown ids are ignored. Return how many there were."""
        with self._using("Deleting chunks") as client:
            known = self.contains(ids)
            for batch in _slices(sorted(known), MAX_LOOKUP):
                client.delete(self.collection, [point_id(each) for each in batch], wait=True)
                self._sync()
        return len(known)

    def delete_source(self, source: str) -> int:
        """Delete all chunks of a source. Return how many there were."""
        return self.delete(self.ids_of_source(source))

    # Reading

    def contains(self, ids: Collection[str]) -> set[str]:
        """Return those of `ids` that are stored, so that only the others need compressing."""
        by_point = {point_id(each): each for each in ids}
        found: set[str] = set()
        for batch in _slices(list(by_point), MAX_LOOKUP):
            with self._using("Looking chunks up") as client:
                records = client.retrieve(self.collection, batch, with_payload=False)
            found.update(by_point[str(record.id)] for record in records)
        return found

    def search(
        self,
        embedding: np.ndarray,
        k: int,
        *,
        where: Where = None,
        with_memories: bool = True,
    ) -> list[Hit]:
        """Return the `k` chunks nearest to an embedding, best first; fewer when there are fewer.

        Args:
            embedding: `(dimension,)`.
            k: At least 1.
            where: Which chunks to consider, see `softrag.store.filters.to_filter`.
            with_memories: False leaves `Hit.memory` None.

        Raises:
            MemoryCodecError: A memory found is damaged.
            StoreError: The storage failed.
        """
        if k < 1:
            raise ValueError(f"k is at least 1, but found {k}.")
        (vector,) = self._check_embeddings(np.asarray(embedding)[None], rows=1)
        # A server's shards would each send their own k candidates with all that is asked for, so
        # the memories of the final k are fetched afterwards.
        in_two_steps = with_memories and self._is_server
        with self._using("Searching") as client:
            points = client.query_points(
                self.collection,
                query=vector.tolist(),
                query_filter=to_filter(where),
                limit=k,
                with_payload=_payload_selector(with_memories and not in_two_steps),
            ).points
            payloads = {str(point.id): point.payload or {} for point in points}
            if in_two_steps:
                for batch in _slices(list(payloads), MAX_LOOKUP):
                    records = client.retrieve(self.collection, batch, with_payload=[MEMORY_FIELD])
                    for record in records:
                        payloads[str(record.id)].update(record.payload or {})
        return [self._hit(point.id, payloads[str(point.id)], score=point.score) for point in points]

    def get(self, ids: Sequence[str], *, with_memories: bool = True) -> list[Hit]:
        """Return chunks by id, in the order of `ids`; unknown ids are left out."""
        hits: dict[str, Hit] = {}
        for batch in _slices([point_id(each) for each in ids], MAX_LOOKUP):
            with self._using("Fetching chunks") as client:
                records = client.retrieve(
                    self.collection, batch, with_payload=_payload_selector(with_memories)
                )
            hits.update((str(r.id), self._hit(r.id, r.payload or {})) for r in records)
        return [hits[key] for each in ids if (key := point_id(each)) in hits]

    def scroll(
        self, *, batch_size: int = 256, where: Where = None, with_memories: bool = True
    ) -> Iterator[Hit]:
        """Yield all chunks, in no particular order.

        Args:
            batch_size: Chunks fetched at a time.
            where: Which chunks, see `softrag.store.filters.to_filter`.
            with_memories: False leaves `Hit.memory` None.
        """
        selector = _payload_selector(with_memories)
        for record in self._scroll(to_filter(where), selector, batch_size=batch_size):
            yield self._hit(record.id, record.payload or {})

    def count(self, where: Where = None) -> int:
        """Return how many chunks there are, or how many match `where`."""
        with self._using("Counting") as client:
            counted = client.count(self.collection, count_filter=to_filter(where), exact=True)
        return int(counted.count)

    def sources(self) -> dict[str, int]:
        """Return how many chunks each source has; chunks without a source are not listed."""
        counts: dict[str, int] = {}
        for record in self._scroll(None, ["source"]):
            source = (record.payload or {}).get("source")
            if source is not None:
                counts[source] = counts.get(source, 0) + 1
        return dict(sorted(counts.items()))

    def ids_of_source(self, source: str) -> set[str]:
        """Return the ids of all chunks of a source."""
        return self.ids_of_sources([source])[source]

    def ids_of_sources(self, sources: Collection[str]) -> dict[str, set[str]]:
        """Return the ids of all chunks of each of `sources`: one look for many sources."""
        ids: dict[str, set[str]] = {source: set() for source in sources}
        # The embedded store compares every point with a filter, which takes longer than reading
        # two fields of all of them.
        filters: list[models.Filter | None] = [None]
        if self._is_server:
            filters = [to_filter({"source": each}) for each in _slices(list(ids), MAX_LOOKUP)]
        for query_filter in filters:
            for record in self._scroll(query_filter, ["source", "chunk_id"]):
                payload = record.payload or {}
                if payload.get("source") in ids:
                    ids[payload["source"]].add(payload.get("chunk_id") or str(record.id))
        return ids

    def memories(self, keys: Collection[str]) -> dict[str, Memory]:
        """Return memories by their key (`Memory.key`); unknown keys are left out."""
        models = qdrant().models
        found: dict[str, Memory] = {}
        for batch in _slices(sorted(set(keys)), MAX_LOOKUP):
            field = models.FieldCondition(key=KEY_FIELD, match=models.MatchAny(any=batch))
            # Several chunks may share a memory: the same text from two sources.
            for record in self._scroll(models.Filter(must=[field]), [KEY_FIELD, MEMORY_FIELD]):
                payload = record.payload or {}
                if payload[KEY_FIELD] not in found:
                    memory = decode_memory(payload, fingerprint=self.record.fingerprint)
                    if memory is not None:
                        found[memory.key] = memory
        return found

    def info(self) -> StoreInfo:
        """Return what the store is and holds."""
        bytes_on_disk = None
        if not self._is_server and self.location != IN_MEMORY:
            files = (Path(self.location) / "collection" / self.collection).rglob("*")
            bytes_on_disk = sum(file.stat().st_size for file in files if file.is_file())
        return StoreInfo(
            location=self.location,
            collection=self.collection,
            chunks=self.count(),
            fingerprint=self.record.fingerprint,
            embedder=self.record.embedder,
            dimension=self.record.dimension,
            codec=self.record.codec,
            bytes_on_disk=bytes_on_disk,
        )

    # Within

    @contextmanager
    def _using(self, doing: str) -> Iterator[QdrantClient]:
        """Give the client to one thread at a time, and its errors softrag's names."""
        with self.lock, store_errors(doing, self.location):
            if not self._close_client.alive:
                raise StoreError(f"{doing} failed: the store {self.location} is closed.")
            yield self.client

    def _sync(self) -> None:
        if self._database is not None:
            sync(self._database)

    def _scroll(
        self, query_filter: models.Filter | None, fields: PayloadFields, *, batch_size: int = 4096
    ) -> Iterator[models.Record]:
        """Yield points with some payload fields, page by page; the lock is free in between."""
        offset = None
        while True:
            with self._using("Reading chunks") as client:
                records, offset = client.scroll(
                    self.collection,
                    scroll_filter=query_filter,
                    limit=batch_size,
                    offset=offset,
                    with_payload=fields,
                )
            yield from records
            if offset is None:
                return

    def _hit(
        self, id_of_point: str | int | uuid.UUID, payload: dict[str, Any], *, score: float = 0.0
    ) -> Hit:
        return to_hit(
            payload,
            point_id=str(id_of_point),
            score=score,
            fingerprint=self.record.fingerprint,
        )

    def _check_embeddings(self, embeddings: np.ndarray, *, rows: int) -> np.ndarray:
        """Return embeddings as `(rows, dimension)` float32, or say what is wrong with them."""
        vectors = np.asarray(embeddings, dtype=np.float32)
        if rows == 0 and vectors.size == 0:
            return vectors.reshape(0, self.record.dimension)
        if vectors.shape != (rows, self.record.dimension):
            raise ValueError(
                f"Search embeddings have shape {vectors.shape}; expected "
                f"{(rows, self.record.dimension)}. Use the embedder {self.record.embedder}."
            )
        if not np.isfinite(vectors).all():
            rows_affected = np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist()
            raise ValueError(f"Search embeddings {rows_affected} hold NaN or infinity.")
        return vectors

    def _warn_if_large(self) -> None:
        if self._is_server or self._has_warned:
            return
        chunks = self.count()
        if chunks > LARGE_EMBEDDED_STORE:
            self._has_warned = True
            logger.warning(
                "The embedded store %s holds %d chunks, keeps them all in memory and compares "
                "with every one. Above %d, run a Qdrant server and give its URL as the store.",
                self.location,
                chunks,
                LARGE_EMBEDDED_STORE,
            )


def point_id(chunk_id: str) -> str:
    """Return the UUID of the point that holds a chunk."""
    return str(uuid.uuid5(_POINT_NAMESPACE, chunk_id))


def _missing(place: str) -> StoreError:
    return StoreError(
        f"{place} does not exist. Index documents into it first, or give the fingerprint, embedder "
        "and dimension to create it."
    )


def _payload_selector(with_memories: bool) -> PayloadFields:
    if with_memories:
        return True
    selector: PayloadFields = qdrant().models.PayloadSelectorExclude(exclude=[MEMORY_FIELD])
    return selector


def _slices(items: list[str], size: int) -> Iterator[list[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _request_batches(
    points: list[models.PointStruct], *, dimension: int
) -> Iterator[list[models.PointStruct]]:
    """Split points so that each request stays within the limits; a larger point goes alone."""
    batch: list[models.PointStruct] = []
    batch_bytes = 0
    for point in points:
        # json escapes everything beyond ASCII, so its text is never the shorter one. A float32 as a
        # decimal number takes up to 24 characters and a comma.
        nbytes = len(json.dumps(point.payload)) + 25 * dimension
        is_full = len(batch) == MAX_REQUEST_POINTS or batch_bytes + nbytes > MAX_REQUEST_BYTES
        if batch and is_full:
            yield batch
            batch, batch_bytes = [], 0
        batch.append(point)
        batch_bytes += nbytes
    if batch:
        yield batch
