"""Reaching a Qdrant collection: embedded in this process, or on a server. It knows no chunks."""

from __future__ import annotations

import errno
import json
import sqlite3
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from softrag.errors import StoreError
from softrag.extras import load_extra

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

IN_MEMORY = ":memory:"

# Seconds. The client's default of 5 is short for an acknowledged write of megabytes.
SERVER_TIMEOUT = 60
GRPC_PORT = 6334


def qdrant() -> ModuleType:
    """Return the `qdrant_client` package."""
    return load_extra("qdrant_client", extra="qdrant", purpose="MemoryStore")


def is_url(location: str) -> bool:
    """Tell a server's URL from a folder."""
    return location.startswith(("http://", "https://"))


def connect(
    location: str,
    *,
    api_key: str | None = None,
    prefer_grpc: bool = False,
    grpc_port: int = GRPC_PORT,
) -> QdrantClient:
    """Return a client of `":memory:"`, a folder or a server's URL.

    Raises:
        StoreError: The folder is open elsewhere or damaged.
    """
    if is_url(location):
        client: QdrantClient = qdrant().QdrantClient(
            url=location,
            api_key=api_key,
            prefer_grpc=prefer_grpc,
            grpc_port=grpc_port,
            timeout=SERVER_TIMEOUT,
            # It would ask from another thread, and warn where an error follows anyway.
            check_compatibility=False,
        )
        return client
    return _open_embedded(location)


def _open_embedded(location: str) -> QdrantClient:
    # The client's own advice, which `_warn_if_large` gives in softrag's words: as a warning it
    # would stop a program that makes warnings errors, after the chunks were stored.
    warnings.filterwarnings("ignore", message="Local mode is not recommended for collections")
    client: QdrantClient
    if location == IN_MEMORY:
        client = qdrant().QdrantClient(location=IN_MEMORY)
        return client
    folder = Path(location)
    folder.mkdir(parents=True, exist_ok=True)
    _check_unlocked(folder)
    manifest = folder / "meta.json"
    if manifest.exists() and manifest.stat().st_size == 0:
        # Qdrant was interrupted when it first opened the folder: nothing can be in it yet.
        manifest.unlink()
    try:
        # Threads may take turns, because `MemoryStore.lock` makes them.
        client = qdrant().QdrantClient(path=location, force_disable_check_same_thread=True)
    except json.JSONDecodeError as error:
        raise StoreError(
            f"{manifest} is damaged ({error}). Restore the folder from a backup, or delete it and "
            "index again."
        ) from error
    except RuntimeError as error:
        # Another process was faster than the check above.
        raise _locked(folder) from error
    return client


def _check_unlocked(folder: Path) -> None:
    """Refuse a folder that is open elsewhere, before the client reads all of it."""
    import portalocker

    lock_file = folder / ".lock"
    if not lock_file.exists():
        return
    with lock_file.open("r+") as file:
        try:
            portalocker.lock(
                file, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING
            )
        except portalocker.exceptions.LockException as error:
            raise _locked(folder) from error
        portalocker.unlock(file)


def _locked(folder: Path) -> StoreError:
    return StoreError(
        f"The store {folder} is open elsewhere: in another process, or a second time in this one. "
        "Close it there, or run a Qdrant server and give its URL, which many can use at once."
    )


def create_collection(
    client: QdrantClient,
    collection: str,
    *,
    dimension: int,
    metadata: dict[str, object],
    indexed_fields: Sequence[str],
) -> None:
    """Create a collection of search embeddings.

    Args:
        client: Of an embedded store or a server.
        collection: Its name.
        dimension: Of a search embedding.
        metadata: Kept with the collection.
        indexed_fields: Payload fields that a server finds points by.
    """
    models = qdrant().models
    try:
        client.create_collection(
            collection,
            # Cosine, since the search embedding is all it is used for: it would normalise memories.
            vectors_config=models.VectorParams(size=dimension, distance=models.Distance.COSINE),
            metadata=metadata,
        )
    except _server_errors():
        # Another process may have created it meanwhile; who is right is checked after this.
        if not client.collection_exists(collection):
            raise
    for field in indexed_fields:
        client.create_payload_index(
            collection, field, field_schema=models.PayloadSchemaType.KEYWORD, wait=True
        )


def open_database(client: QdrantClient, collection: str) -> sqlite3.Connection | None:
    """Return the database of an embedded collection, set to be synced by `sync`.

    The client commits every point by itself, with several syncs of the disk each, which takes most
    of the time of storing. In a write-ahead log commits need none until `sync`. A killed process
    loses nothing committed either way; what `sync` saw survives a power cut, too.

    Returns:
        None in memory, on a file system without write-ahead logs, and when the client keeps its
        database elsewhere: the commits are then synced one by one.
    """
    embedded: Any = client._client  # no public way leads to the database
    try:
        database: sqlite3.Connection = embedded.collections[collection].storage.storage
        (mode,) = database.execute("PRAGMA journal_mode = WAL").fetchone()
    except (AttributeError, KeyError):
        return None
    if mode != "wal":
        return None
    database.execute("PRAGMA synchronous = NORMAL")
    return database


def sync(database: sqlite3.Connection) -> None:
    """Make everything committed survive a power cut."""
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def _server_errors() -> tuple[type[Exception], ...]:
    exceptions = load_extra("qdrant_client.http.exceptions", extra="qdrant", purpose="MemoryStore")
    grpc = load_extra("grpc", extra="qdrant", purpose="MemoryStore")
    return exceptions.ApiException, grpc.RpcError


@contextmanager
def store_errors(doing: str, location: str) -> Iterator[None]:
    """Raise what goes wrong in the storage as `StoreError`."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        if _is_disk_full(error):
            raise StoreError(
                f"{doing} failed: the disk of {location} is full ({error}). All chunks stored "
                "before are intact. Free some space and run it again; it goes on where it stopped."
            ) from error
        raise StoreError(
            f"{doing} failed in {location}: {error}. Check that it is a folder this user may "
            "write, on a working disk."
        ) from error
    except _server_errors() as error:
        raise StoreError(
            f"{doing} failed on the Qdrant server {location}: {_reason(error)}. Check that it is "
            "running there, and the API key if it has one."
        ) from error


def _reason(error: Exception) -> str:
    grpc = load_extra("grpc", extra="qdrant", purpose="MemoryStore")
    # As text, an error of gRPC is a page of debugging.
    return str(error.details()) if isinstance(error, grpc.Call) else str(error)


def _is_disk_full(error: sqlite3.Error | OSError) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "disk is full" in str(error)
