"""Where chunks and their memories are kept: one Qdrant collection, embedded or on a server."""

from softrag.store.layout import CollectionLayout
from softrag.store.migration import MigrationReport, migrate
from softrag.store.payload import decode_memory, encode_memory
from softrag.store.qdrant import MemoryStore
from softrag.store.record import StoreInfo
from softrag.store.snapshots import restore, snapshot

__all__ = [
    "CollectionLayout",
    "MemoryStore",
    "MigrationReport",
    "StoreInfo",
    "decode_memory",
    "encode_memory",
    "migrate",
    "restore",
    "snapshot",
]
