"""MemoryStore: chunks, their search embeddings and memories in one Qdrant collection.

One point per chunk: the search embedding as its vector, everything else as its payload (see
`softrag.store.payload`). It knows no model and no embedder, only their names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection as Ids
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from softrag.checks import check_count, check_texts
from softrag.codec import CODECS
from softrag.documents import Chunk, Hit
from softrag.errors import StoreError
from softrag.handles import MemoryCache
from softrag.memory import Memory
from softrag.store.collection import MAX_LOOKUP, Collection, id_of, slices
from softrag.store.connection import GRPC_PORT, connect, is_url, qdrant, store_errors
from softrag.store.embedded import bytes_on_disk
from softrag.store.filters import to_filter
from softrag.store.layout import CollectionLayout, create_collection
from softrag.store.payload import KEY_FIELD, MEMORY_FIELD, memory_of, to_hit
from softrag.store.points import Points, check_embeddings, make_points, point_id, unit
from softrag.store.record import StoreInfo, StoreRecord

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models

    from softrag.store.collection import PayloadFields
    from softrag.store.filters import Where

logger = logging.getLogger(__name__)

# The embedded store keeps everything in memory and compares with every point.
LARGE_EMBEDDED_STORE = 20_000


class MemoryStore:
    """Chunks with their search embeddings and memories. Safe to share between threads.

    Open it with `MemoryStore.open`. Every write is acknowledged: once `upsert` or `delete` has
    returned, its effect survives the death of the process.

    Attributes:
        location: `":memory:"`, a folder or a URL.
        collection: Name of the Qdrant collection.
        record: The model, embedder and codec the collection belongs to.
        points: The collection as Qdrant has it, for what this class does not offer.
        hot: Memories a search got from a server lately, which are not sent again.
    """

    def __init__(self, points: Collection, record: StoreRecord) -> None:
        self.points = points
        self.location = points.location
        self.collection = points.name
        self.record = record
        self.hot = MemoryCache()
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
        layout: CollectionLayout | None = None,
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
            api_key: Of the server; None takes `QDRANT_API_KEY` from the environment.
            prefer_grpc: Talk gRPC instead of HTTP to the server.
            grpc_port: Of the server, on the URL's host.
            layout: How a server keeps a new collection; None leaves it to the server.

        Raises:
            MemoryMismatchError: The collection belongs to another model or embedder.
            StoreError: It cannot be opened, created or read.
        """
        if codec is not None and codec not in CODECS:
            raise ValueError(f"Unknown codec {codec!r}. Choose one of {', '.join(CODECS)}.")
        if not isinstance(location, str | Path):
            raise TypeError(
                f"A store is a folder, a Qdrant URL or ':memory:', found {location!r:.80}."
            )
        location = str(location)
        if re.fullmatch(r"[\w.-]+:\d+/?", location):
            raise ValueError(
                f"{location} could be a server or a folder. Write http://{location} for a server, "
                f"./{location} for a folder."
            )
        if "://" in location and not is_url(location):
            raise ValueError(
                f"{location} is neither a folder nor the URL of a Qdrant server, which begins with "
                "http:// or https://; for gRPC, set prefer_grpc as well."
            )
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
                        layout=layout,
                        # The embedded store has no indexes, and would warn.
                        indexed_fields=("source", KEY_FIELD) if is_url(location) else (),
                        embedded=not is_url(location),
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
                return cls(Collection(client, location=location, name=collection), record)
            except BaseException:
                client.close()
                raise

    @property
    def client(self) -> QdrantClient:
        """The Qdrant client; hold `lock` around every use of it."""
        return self.points.client

    @property
    def lock(self) -> AbstractContextManager[object]:
        """Makes threads take turns, as the embedded client needs it."""
        return self.points.lock

    def close(self) -> None:
        """Let go of the folder or the connection. Closing twice does nothing."""
        self.points.close()

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(self, *error: object) -> None:
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
        self.write(make_points(self.record, chunks, embeddings, memories, place=self.location))

    def write(self, points: Points) -> None:
        """Store points as they are: those that `make_points` made, here or in another process."""
        self.points.upsert(points)
        self._warn_if_large()

    def delete(self, ids: Ids[str]) -> int:
        """Delete chunks by id; unknown ids are ignored. Return how many there were."""
        with self.lock:
            known = self.contains(ids)
            self.points.delete([point_id(each) for each in sorted(known)])
        return len(known)

    def delete_source(self, source: str) -> int:
        """Delete all chunks of a source. Return how many there were."""
        return self.delete(self.ids_of_source(source))

    # Reading

    def contains(self, ids: Ids[str]) -> set[str]:
        """Return those of `ids` that are stored, so that only the others need compressing."""
        check_texts("ids", ids)
        by_point = {point_id(each): each for each in ids}
        return {by_point[id_of(each)] for each in self.points.retrieve(list(by_point), False)}

    def missing(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Return those of `chunks` that are not stored, or with another title or metadata."""
        ids = [point_id(chunk.id) for chunk in chunks]
        records = self.points.retrieve(ids, ["title", "metadata"])
        stored = {id_of(record): record.payload or {} for record in records}
        return [
            chunk
            for chunk, id_ in zip(chunks, ids, strict=True)
            if id_ not in stored
            or stored[id_].get("title") != chunk.title
            or (stored[id_].get("metadata") or {}) != dict(chunk.metadata)
        ]

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
        check_count("k", k)
        (vector,) = unit(check_embeddings(self.record, np.asarray(embedding)[None], rows=1))
        # A server's shards would each send their own k candidates with all that is asked for, so
        # the memories of the final k are fetched afterwards, if they are not here already.
        in_two_steps = with_memories and self.points.is_server
        points = self.points.query(
            vector,
            k,
            query_filter=to_filter(where),
            fields=_fields(with_memories and not in_two_steps),
        )
        payloads = {id_of(point): point.payload or {} for point in points}
        hits = [
            self._hit(id_of(point), payloads[id_of(point)], score=point.score) for point in points
        ]
        return self._with_memories(hits, payloads) if in_two_steps else hits

    def get(self, ids: Sequence[str], *, with_memories: bool = True) -> list[Hit]:
        """Return chunks by id, in the order of `ids`; unknown ids are left out."""
        check_texts("ids", ids)
        records = self.points.retrieve([point_id(each) for each in ids], _fields(with_memories))
        hits = {id_of(r): self._hit(id_of(r), r.payload or {}) for r in records}
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
        pages = self.points.scroll(to_filter(where), _fields(with_memories), batch_size=batch_size)
        return (self._hit(id_of(r), r.payload or {}) for page in pages for r in page)

    def count(self, where: Where = None) -> int:
        """Return how many chunks there are, or how many match `where`."""
        return self.points.count(to_filter(where))

    def sources(self) -> dict[str, int]:
        """Return how many chunks each source has; chunks without a source are not listed."""
        counts: dict[str, int] = {}
        for payload in self._payloads(None, ["source"]):
            source = payload.get("source")
            if source is not None:
                counts[source] = counts.get(source, 0) + 1
        return dict(sorted(counts.items()))

    def ids_of_source(self, source: str) -> set[str]:
        """Return the ids of all chunks of a source."""
        # None would stand for all chunks that have no source, to be deleted by a slip.
        if not isinstance(source, str):
            raise TypeError(f"source must be a string, found {source!r:.80}.")
        return self.ids_of_sources([source])[source]

    def ids_of_sources(self, sources: Ids[str]) -> dict[str, set[str]]:
        """Return the ids of all chunks of each of `sources`: one look for many sources."""
        ids: dict[str, set[str]] = {source: set() for source in sources}
        # The embedded store compares every point with a filter, which takes longer than reading
        # two fields of all of them.
        filters: list[models.Filter | None] = [None]
        if self.points.is_server:
            filters = [to_filter({"source": each}) for each in slices(list(ids), MAX_LOOKUP)]
        for query_filter in filters:
            for page in self.points.scroll(query_filter, ["source", "chunk_id"]):
                for record in page:
                    payload = record.payload or {}
                    if payload.get("source") in ids:
                        ids[payload["source"]].add(payload.get("chunk_id") or id_of(record))
        return ids

    def memories(self, keys: Ids[str]) -> dict[str, Memory]:
        """Return memories by their key (`Memory.key`); unknown keys are left out."""
        check_texts("keys", keys)
        models = qdrant().models
        found: dict[str, Memory] = {}
        for batch in slices(sorted(set(keys)), MAX_LOOKUP):
            field = models.FieldCondition(key=KEY_FIELD, match=models.MatchAny(any=list(batch)))
            # Several chunks may share a memory: the same text from two sources.
            with_key = models.Filter(must=[field])
            for payload in self._payloads(with_key, [KEY_FIELD, MEMORY_FIELD, "text", "title"]):
                if payload[KEY_FIELD] not in found:
                    memory = memory_of(payload, fingerprint=self.record.fingerprint)
                    if memory is not None:
                        found[memory.key] = memory
        return found

    def info(self) -> StoreInfo:
        """Return what the store is and holds."""
        is_server = self.points.is_server
        return StoreInfo(
            location=self.location,
            collection=self.collection,
            chunks=self.count(),
            fingerprint=self.record.fingerprint,
            embedder=self.record.embedder,
            dimension=self.record.dimension,
            codec=self.record.codec,
            bytes_on_disk=None if is_server else bytes_on_disk(self.location, self.collection),
        )

    # Within

    def _payloads(
        self, query_filter: models.Filter | None, fields: PayloadFields
    ) -> Iterator[dict[str, Any]]:
        for page in self.points.scroll(query_filter, fields):
            yield from (record.payload or {} for record in page)

    def _with_memories(self, hits: list[Hit], payloads: dict[str, dict[str, Any]]) -> list[Hit]:
        """Fill in the memories of hits, whose payloads have none, in their order."""
        keys = {point: payload.get(KEY_FIELD) for point, payload in payloads.items()}
        found = {point: self.hot.get(key) for point, key in keys.items() if key is not None}
        missing = [point for point, memory in found.items() if memory is None]
        if missing:
            for record in self.points.retrieve(missing, [MEMORY_FIELD]):
                whole = {**payloads[id_of(record)], **(record.payload or {})}
                memory = memory_of(whole, fingerprint=self.record.fingerprint)
                if memory is not None:
                    self.hot.put(memory)
                    found[id_of(record)] = memory
        return [
            replace(hit, memory=found.get(point)) for hit, point in zip(hits, payloads, strict=True)
        ]

    def _hit(self, id_of_point: str, payload: dict[str, Any], *, score: float = 0.0) -> Hit:
        return to_hit(
            payload, point_id=id_of_point, score=score, fingerprint=self.record.fingerprint
        )

    def _warn_if_large(self) -> None:
        if self.points.is_server or self._has_warned:
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


def _missing(place: str) -> StoreError:
    return StoreError(
        f"{place} does not exist. Index documents into it first (softrag index), or give the "
        "fingerprint, embedder and dimension to create it."
    )


def _fields(with_memories: bool) -> PayloadFields:
    if with_memories:
        return True
    without: PayloadFields = qdrant().models.PayloadSelectorExclude(exclude=[MEMORY_FIELD])
    return without
