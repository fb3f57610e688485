"""Bulk indexing: many processes fill one store."""

from softrag.bulk.coordinator import Progress
from softrag.bulk.index import BulkReport, index_files, prune_vanished
from softrag.bulk.worker import StoreAddress, WorkerSetup, load_indexer

__all__ = [
    "BulkReport",
    "Progress",
    "StoreAddress",
    "WorkerSetup",
    "index_files",
    "load_indexer",
    "prune_vanished",
]
