"""Engines for these tests: a tiny random one, and the demo model's."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import Iterator

import pytest

from softrag import Compressor, Document, MemoryStore, SoftRAG, SoftRAGModel, TorchDecoder
from tests.checkpoints import build_checkpoint
from tests.embedders import HashingEmbedder
from tests.families import SENTENCES
from tests.integrations.llama_index.recording import RecordingDecoder
from tests.test_readme import CHECKPOINT

QUESTION = "Who wrote Hamlet and Macbeth?"
DOCUMENTS = [
    Document(
        text=text, source=f"notes/{number}.txt", title=f"Note {number}", metadata={"number": number}
    )
    for number, text in enumerate(SENTENCES)
]


def open_engine(store="memory", **kind: bool) -> SoftRAG:
    """Open a tiny engine whose decoder writes down its batch sizes."""
    model = SoftRAGModel.from_pretrained(build_checkpoint(**kind), device="cpu")
    embedder = HashingEmbedder()
    lock = threading.Lock()
    return SoftRAG(
        store=MemoryStore.open(
            ":memory:" if store == "memory" else store,
            fingerprint=model.fingerprint,
            embedder=embedder.name,
            dimension=embedder.dimension,
        ),
        embedder=embedder,
        compressor=Compressor(model, lock=lock),
        decoder=RecordingDecoder(TorchDecoder(model, lock=lock)),
    )


@pytest.fixture(autouse=True)
def event_loop_of_sync_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """LlamaIndex's sync calls take the thread's event loop, or make one that nobody closes."""
    if inspect.iscoroutinefunction(request.function):
        yield
        return
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.fixture
def empty() -> Iterator[SoftRAG]:
    """An engine with nothing in its store."""
    with open_engine() as engine:
        yield engine


@pytest.fixture(scope="module")
def softrag() -> Iterator[SoftRAG]:
    """An engine with `DOCUMENTS` in its store; read it only."""
    with open_engine() as engine:
        engine.add(DOCUMENTS)
        yield engine


@pytest.fixture(scope="session")
def demo() -> Iterator[SoftRAG]:
    """The demo model over the ten documents that its questions are about; read it only."""
    if not CHECKPOINT.exists():
        pytest.skip("the demo checkpoint is not in this tree")
    folder = CHECKPOINT.parent
    questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    with SoftRAG.from_pretrained(CHECKPOINT) as engine:
        engine.add(
            Document(
                # The first paragraphs hold the answers, and tests should be quick.
                text=(folder / "corpus" / each["file"]).read_text(encoding="utf-8")[:1500],
                source=each["file"],
                title=each["file"].removesuffix(".md"),
            )
            for each in questions
        )
        yield engine


@pytest.fixture(scope="session")
def demo_questions() -> list[str]:
    """The demo's questions."""
    path = CHECKPOINT.parent / "questions.json"
    return [each["question"] for each in json.loads(path.read_text(encoding="utf-8"))]
