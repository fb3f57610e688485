"""Where chunks and their memories are kept: one Qdrant collection, embedded or on a server."""

from softrag.store.payload import decode_memory, encode_memory
from softrag.store.qdrant import MemoryStore, StoreInfo

__all__ = ["MemoryStore", "StoreInfo", "decode_memory", "encode_memory"]
