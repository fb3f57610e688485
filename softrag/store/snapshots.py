"""A store as one file, and back: a tar of an embedded folder, a server's own snapshot."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from softrag.errors import StoreError
from softrag.extras import load_extra
from softrag.store.connection import connect, is_url, store_errors
from softrag.store.embedded import IN_MEMORY
from softrag.store.qdrant import MemoryStore

if TYPE_CHECKING:
    import httpx

# Seconds between two pieces of a large file; a server packs a snapshot before it sends the first.
TRANSFER_TIMEOUT = 3600


def snapshot(store: MemoryStore, file: str | Path) -> int:
    """Write a store to a file, while it may be searched. Return the file's size in bytes.

    Of a folder all collections are kept. Of a server the one collection is kept in Qdrant's own
    format; in a cluster that is the part on the node of the URL, so that every node needs one.

    Raises:
        StoreError: The store is in memory only, or failed.
    """
    file = Path(file)
    partial = file.with_name(f"{file.name}.part")
    if store.location == IN_MEMORY:
        raise StoreError("A store in memory cannot be kept as a file. Migrate it into a folder.")
    if not file.parent.is_dir():
        raise StoreError(f"{file} cannot be written: {file.parent} is no folder. Make it first.")
    if file.is_dir():
        raise StoreError(f"{file} cannot be written: it is a folder. Name a file in it.")
    with store_errors("Taking a snapshot", store.location):
        if store.points.is_server:
            _download(store, partial)
        else:
            # Nobody writes meanwhile, and all that is committed is in the database's own file.
            with store.lock, tarfile.open(partial, "w") as archive:
                store.points.sync()
                folder = Path(store.location)
                for name in ("meta.json", "collection"):
                    archive.add(folder / name, arcname=name)
        partial.replace(file)
    return file.stat().st_size


def restore(
    file: str | Path,
    location: str | Path,
    *,
    collection: str = "softrag",
    api_key: str | None = None,
) -> None:
    """Make a store of a snapshot. Restore only files you trust, as you open only such folders.

    Args:
        file: Written by `snapshot`.
        location: A folder that does not exist or is empty; or a server's URL, where the collection
            is made, or replaced by the file's.
        collection: On a server, its name; a folder has the names it had.
        api_key: Of a server, as of `MemoryStore.open`.

    Raises:
        StoreError: The folder holds something, the file is no snapshot, or the server failed.
    """
    file, location = Path(file), str(location)
    with store_errors("Restoring", location):
        if is_url(location):
            _upload(file, location, collection, api_key)
            return
        folder = Path(location)
        if folder.exists() and any(folder.iterdir()):
            raise StoreError(f"{folder} is not empty. Restore into a folder that is new.")
        try:
            with tarfile.open(file) as archive:
                if "meta.json" not in archive.getnames():
                    raise StoreError(f"{file} holds no store: there is no meta.json in it.")
                folder.mkdir(parents=True, exist_ok=True)
                archive.extractall(folder, filter="data")
        except tarfile.TarError as error:
            raise StoreError(
                f"{file} cannot be read as a snapshot. Expected what `softrag store snapshot` "
                "wrote of a folder; one of a server is restored on a server."
            ) from error


def _download(store: MemoryStore, file: Path) -> None:
    with store.points.using("Taking a snapshot") as client:
        made = client.create_snapshot(store.collection, wait=True)
        if made is None:
            raise StoreError(f"{store.location} took no snapshot of {store.collection}.")
        try:
            digest = hashlib.sha256()
            path = f"/collections/{quote(store.collection)}/snapshots/{quote(made.name)}"
            with (
                _http(client.init_options) as http,
                http.stream("GET", path) as answer,
                file.open("wb") as out,
            ):
                answer.raise_for_status()
                for data in answer.iter_bytes():
                    digest.update(data)
                    out.write(data)
            if made.checksum is not None and digest.hexdigest() != made.checksum:
                raise StoreError(
                    f"The snapshot {made.name} arrived damaged: its checksum is "
                    f"{digest.hexdigest()}, the server's {made.checksum}. Take it again."
                )
        finally:
            # The server keeps a file of the collection's size until told otherwise.
            client.delete_snapshot(store.collection, made.name, wait=True)


def _upload(file: Path, location: str, collection: str, api_key: str | None) -> None:
    client = connect(location, api_key=api_key)
    try:
        with _http(client.init_options) as http, file.open("rb") as data:
            http.post(
                f"/collections/{quote(collection)}/snapshots/upload",
                params={"wait": "true", "priority": "snapshot"},
                files={"snapshot": (file.name, data)},
            ).raise_for_status()
    finally:
        client.close()


@contextmanager
def _http(options: dict[str, Any]) -> Iterator[httpx.Client]:
    """Open a connection to the server of a Qdrant client, for what the client holds in memory."""
    library = load_extra("httpx", extra="qdrant", purpose="Snapshots of a server")
    headers = {"api-key": options["api_key"]} if options["api_key"] else {}
    try:
        with library.Client(
            base_url=options["url"], headers=headers, timeout=TRANSFER_TIMEOUT
        ) as http:
            yield http
    except library.HTTPError as error:
        raise StoreError(
            f"The Qdrant server {options['url']} did not do it: {error}. Check that it is running "
            "there, and the API key if it has one."
        ) from error
