"""A running server with a tiny model and two tenants."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from softrag.documents import Document
from softrag.engine import SoftRAG
from softrag.serve import Keys, ServeSettings, build_server, open_tenants
from tests.checkpoints import build_checkpoint
from tests.embedders import HashingEmbedder
from tests.families import SENTENCES

ACME = "acme-key-0123456789"
GLOBEX = "globex-key-0123456789"
METRICS = "metrics-key-0123456789"
SETTINGS = ServeSettings(
    model="tiny",
    port=0,
    keys=Keys({ACME: "acme", GLOBEX: "globex"}),
    metrics_key=METRICS,
)
DOCUMENTS = {
    "acme": [
        Document(text=text, source=f"notes/{number}.txt", title=f"Note {number}")
        for number, text in enumerate(SENTENCES)
    ],
    "globex": [
        Document(
            text="The secret of Globex is a doomsday device.",
            source="plans.txt",
            metadata={"level": "secret"},
        )
    ],
}


class HoldableEmbedder(HashingEmbedder):
    """Keeps questions waiting while it is held, as a busy model would."""

    def __init__(self):
        self.free = threading.Event()
        self.free.set()

    def embed_query(self, text):
        assert self.free.wait(30)
        return super().embed_query(text)


class Served(NamedTuple):
    """A running server; `engines` answer what it should answer."""

    address: str
    engines: dict[str, SoftRAG]
    embedder: HoldableEmbedder

    @contextmanager
    def held(self) -> Iterator[None]:
        """No question is answered within the block."""
        self.embedder.free.clear()
        try:
            yield
        finally:
            self.embedder.free.set()

    def client(self, key: str | None = ACME, **options) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.address, headers=headers, timeout=30, **options)


@contextmanager
def serving(folder: Path, **changes) -> Iterator[Served]:
    """Run a server in a thread until the end of the block."""
    settings = replace(SETTINGS, **changes)
    embedder = HoldableEmbedder()
    with SoftRAG.from_pretrained(build_checkpoint(), embedder=embedder, device="cpu") as engine:
        engines = open_tenants(
            engine, str(folder), settings.keys.tenants if settings.keys else [""]
        )
        for tenant, own in engines.items():
            own.add(DOCUMENTS[tenant or "acme"])
        addresses: list[str] = []
        started = threading.Event()

        def on_start(address: str) -> None:
            addresses.append(address)
            started.set()

        server = build_server(engines, settings, on_start=on_start, quiet=True)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            assert started.wait(30)
            yield Served(addresses[0], engines, embedder)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[Served]:
    """One server for all tests that leave its documents as they are."""
    with serving(tmp_path_factory.mktemp("store")) as served:
        yield served


@pytest.fixture
def own_server(tmp_path) -> Iterator[Served]:
    """A server for a test that changes documents."""
    with serving(tmp_path) as served:
        yield served
