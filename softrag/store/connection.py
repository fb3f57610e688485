"""Reaching Qdrant, embedded or on a server, and its errors in softrag's words."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

from softrag.errors import StoreError
from softrag.extras import load_extra
from softrag.store.embedded import open_embedded

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

# Seconds. The client's default of 5 is short for an acknowledged write of megabytes.
SERVER_TIMEOUT = 60
GRPC_PORT = 6334
API_KEY_VARIABLE = "QDRANT_API_KEY"


def qdrant() -> ModuleType:
    """Return the `qdrant_client` package."""
    return load_extra("qdrant_client", extra="qdrant", purpose="MemoryStore")


def is_url(location: str) -> bool:
    """Tell a server's URL from a folder."""
    return location.lower().startswith(("http://", "https://"))


def connect(
    location: str,
    *,
    api_key: str | None = None,
    prefer_grpc: bool = False,
    grpc_port: int = GRPC_PORT,
) -> QdrantClient:
    """Return a client of `":memory:"`, a folder or a server's URL.

    Args:
        location: An `https://` URL is spoken to in TLS, over HTTP and over gRPC. A private
            certificate authority is named by the variables that the two libraries read:
            `SSL_CERT_FILE` and `GRPC_DEFAULT_SSL_ROOTS_FILE_PATH`.
        api_key: Of a server; None takes `QDRANT_API_KEY` from the environment.
        prefer_grpc: Talk gRPC instead of HTTP to a server.
        grpc_port: Of a server, on the URL's host.

    Raises:
        StoreError: The folder is open elsewhere or damaged.
    """
    if not is_url(location):
        return open_embedded(location)
    client: QdrantClient = qdrant().QdrantClient(
        url=location,
        api_key=api_key or os.environ.get(API_KEY_VARIABLE),
        prefer_grpc=prefer_grpc,
        grpc_port=grpc_port,
        timeout=SERVER_TIMEOUT,
        # It would ask from another thread, and warn where an error follows anyway.
        check_compatibility=False,
    )
    return client


def server_errors() -> tuple[type[Exception], ...]:
    """Return what the client raises when a server refuses or cannot be reached."""
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
    except server_errors() as error:
        raise StoreError(
            f"{doing} failed on the Qdrant server {location}: {_reason(error)}. Check that it is "
            f"running there, and the API key if it has one ({API_KEY_VARIABLE})."
        ) from error


def _reason(error: Exception) -> str:
    grpc = load_extra("grpc", extra="qdrant", purpose="MemoryStore")
    # As text, an error of gRPC is a page of debugging.
    return str(error.details()) if isinstance(error, grpc.Call) else str(error)


def _is_disk_full(error: sqlite3.Error | OSError) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "disk is full" in str(error)
