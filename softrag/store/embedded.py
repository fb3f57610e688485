"""The embedded Qdrant: a folder of this process alone, and how its writes reach the disk."""

from __future__ import annotations

import sqlite3
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softrag.errors import StoreError
from softrag.extras import load_extra

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

IN_MEMORY = ":memory:"


def open_embedded(location: str) -> QdrantClient:
    """Return a client of `":memory:"` or a folder, which is made when there is none.

    Raises:
        StoreError: The folder is open elsewhere or damaged.
    """
    library = load_extra("qdrant_client", extra="qdrant", purpose="MemoryStore")
    # The client's own advice, which `MemoryStore` gives in softrag's words: as a warning it would
    # stop a program that makes warnings errors, after the chunks were stored.
    warnings.filterwarnings("ignore", message="Local mode is not recommended for collections")
    client: QdrantClient
    if location == IN_MEMORY:
        client = library.QdrantClient(location=IN_MEMORY)
        return client
    folder = Path(location)
    folder.mkdir(parents=True, exist_ok=True)
    _check_unlocked(folder)
    manifest = folder / "meta.json"
    if manifest.exists() and manifest.stat().st_size == 0:
        # Qdrant was interrupted when it first opened the folder: nothing can be in it yet.
        manifest.unlink()
    try:
        # Threads may take turns, because `Collection.lock` makes them.
        client = library.QdrantClient(path=location, force_disable_check_same_thread=True)
    except RuntimeError as error:
        # Another process was faster than the check above.
        raise _locked(folder) from error
    except (sqlite3.Error, OSError, MemoryError):
        raise
    except Exception as error:  # on damaged files, the client raises whatever it runs into
        place = manifest if isinstance(error, ValueError) else folder
        raise StoreError(
            f"{place} is damaged ({type(error).__name__}: {error}). Restore the folder from a "
            "backup, or delete it and index again."
        ) from error
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


def bytes_on_disk(location: str, collection: str) -> int | None:
    """Return what a collection takes on disk; None in memory."""
    if location == IN_MEMORY:
        return None
    files = (Path(location) / "collection" / collection).rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
