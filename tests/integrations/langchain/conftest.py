"""Engines: a tiny random model to test behaviour, the demo model for LangChain's suites."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import softrag
from langchain_softrag import SoftRAGQdrantVectorStore
from softrag import Document, SoftRAG
from tests.checkpoints import build_checkpoint
from tests.embedders import HashingEmbedder
from tests.families import SENTENCES

DEMO = Path(softrag.__file__).parent / "demo"


@pytest.fixture(scope="session")
def demo_engine() -> Iterator[SoftRAG]:
    """The shipped model over a few of its documents. Shared: read it, write elsewhere."""
    with SoftRAG.from_pretrained(DEMO / "checkpoint", device="cpu") as engine:
        for name in ("piano", "violin", "chess"):
            text = (DEMO / "corpus" / f"{name}.md").read_text(encoding="utf-8")
            engine.add([Document(text=text[:2000], source=f"{name}.md", title=name.title())])
        yield engine


@pytest.fixture(scope="module")
def engine() -> Iterator[SoftRAG]:
    """A tiny model over the sentences, as `softrag index` would store them."""
    with open_engine() as engine:
        engine.add(
            Document(text=text, source=f"{number}.txt", metadata={"number": number})
            for number, text in enumerate(SENTENCES)
        )
        yield engine


@pytest.fixture
def store() -> Iterator[SoftRAGQdrantVectorStore]:
    """An empty store of a tiny model."""
    with open_engine() as engine:
        yield SoftRAGQdrantVectorStore(engine)


def open_engine(store: str | Path = ":memory:", **options: bool | float) -> SoftRAG:
    """Open a tiny engine."""
    return SoftRAG.from_pretrained(
        build_checkpoint(
            query_dependent=options.pop("query_dependent", False),
            rerank=options.pop("rerank", False),
        ),
        store=store,
        embedder=HashingEmbedder(),
        device="cpu",
        **options,
    )
