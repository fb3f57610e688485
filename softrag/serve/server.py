"""From a checkpoint, a store and keys to a running server."""

from __future__ import annotations

import gc
import signal
import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import uvicorn

from softrag.engine import SoftRAG
from softrag.serve.app import create_app
from softrag.serve.auth import DEFAULT_TENANT
from softrag.serve.connections import protocol_with
from softrag.serve.settings import ServeSettings
from softrag.store import MemoryStore


def open_tenants(
    engine: SoftRAG,
    location: str,
    tenants: Iterable[str],
    *,
    collection: str = "softrag",
    prefer_grpc: bool = False,
) -> dict[str, SoftRAG]:
    """Open a store for every tenant, with one model for all.

    The default tenant has the store itself, every other one a folder in it, `tenants/NAME`, or on
    a Qdrant server a collection of its own, `COLLECTION_NAME`.

    Args:
        engine: Its model, embedder and decoder are used, its store is not.
        location: A folder or a Qdrant URL.
        tenants: Their names, checked by `Keys`.
        collection: Of the default tenant; begins the names of the others' on a server.
        prefer_grpc: Talk gRPC to a server.
    """
    maker = engine.compressor or engine.decoder
    assert maker is not None
    engines: dict[str, SoftRAG] = {}
    for tenant in sorted(tenants):
        place, own = location, collection
        if tenant != DEFAULT_TENANT:
            if "://" in location:
                own = f"{collection}_{tenant}"
            else:
                place = str(Path(location) / "tenants" / tenant)
        store = MemoryStore.open(
            place,
            collection=own,
            prefer_grpc=prefer_grpc,
            fingerprint=maker.fingerprint,
            embedder=engine.embedder.name,
            dimension=engine.embedder.dimension,
        )
        engines[tenant] = SoftRAG(
            store=store,
            embedder=engine.embedder,
            compressor=engine.compressor,
            decoder=engine.decoder,
            chunk_tokens=engine.chunk_tokens,
            fallback=engine.fallback,
            copy_bias=engine.copy_bias,
        )
    return engines


def check_address(host: str, port: int) -> None:
    """Say that an address is taken before a model is loaded for it, not after.

    Raises:
        OSError: Nothing can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise OSError(
            f"Nothing can listen at {host}:{port}: {error.strerror}. Stop what listens there, or "
            "give another --port (0 takes a free one) or --host."
        ) from error


def build_server(
    engines: Mapping[str, SoftRAG],
    settings: ServeSettings,
    *,
    on_start: Callable[[str], None] | None = None,
    quiet: bool = False,
) -> uvicorn.Server:
    """Return a server that is ready to run.

    Args:
        engines: By tenant, see `open_tenants`; closed when the server ends.
        settings: The server's.
        on_start: Told the server's address once it listens.
        quiet: Write no log of requests.
    """
    config = uvicorn.Config(
        create_app(engines, settings),
        host=settings.host,
        port=settings.port,
        http=protocol_with(settings.header_timeout_s),
        ws="none",
        lifespan="on",
        access_log=not quiet,
        log_level="warning" if quiet else "info",
        server_header=False,
        # Every running answer ends by then.
        timeout_graceful_shutdown=int(settings.timeout_s) + 1,
    )
    return _Server(config, on_start)


def run(server: uvicorn.Server) -> None:
    """Serve until SIGINT or SIGTERM; answers that run are finished first."""
    # A full collection of a loaded model's garbage would stop every answer for a while.
    gc.collect()
    gc.freeze()
    # uvicorn raises the signal once more when all is done; there is nothing left to interrupt.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    server.run()


class _Server(uvicorn.Server):
    """Says where it listens."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[str], None] | None) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        if self._on_start is not None and self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._on_start(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
