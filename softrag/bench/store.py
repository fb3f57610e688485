"""The store measured: writing chunks with memories, and finding them again."""

from __future__ import annotations

import statistics
import tempfile
from time import perf_counter

import numpy as np
import torch

from softrag.bench.measure import Recorder
from softrag.documents import Chunk, chunk_id
from softrag.memory import Memory, memory_key
from softrag.store import MemoryStore

FINGERPRINT = "0" * 32


def bench_store(
    recorder: Recorder,
    *,
    chunks: int,
    hidden: int,
    n_soft: int = 8,
    dimension: int = 384,
    location: str | None = None,
    batch: int = 64,
    top_k: int = 5,
) -> None:
    """Measure a store of random memories.

    Args:
        recorder: Takes the results.
        chunks: How many to store.
        hidden: Width of a soft token.
        n_soft: Soft tokens of a chunk.
        dimension: Of search embeddings.
        location: As `MemoryStore.open` takes it; None for a temporary folder.
        batch: Chunks per write.
        top_k: Chunks per search.
    """
    chance = np.random.default_rng(recorder.seed)
    generator = torch.Generator().manual_seed(recorder.seed)
    with tempfile.TemporaryDirectory() as folder:
        store = MemoryStore.open(
            location or folder, collection="softrag_bench", fingerprint=FINGERPRINT,
            embedder="random", dimension=dimension,
        )  # fmt: skip
        with store:
            embeddings = chance.standard_normal((chunks, dimension)).astype(np.float32)
            embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
            raw = n_soft * hidden * 2
            spent = 0.0
            for start in range(0, chunks, batch):
                numbers = range(start, min(chunks, start + batch))
                written = [_chunk(number) for number in numbers]
                memories = [
                    Memory(
                        values=torch.randn(n_soft, hidden, generator=generator).bfloat16(),
                        key=memory_key(FINGERPRINT, chunk.text),
                        fingerprint=FINGERPRINT,
                        n_document_tokens=128,
                    )
                    for chunk in written
                ]
                started = perf_counter()
                store.upsert(written, embeddings[start : start + len(written)], memories)
                spent += perf_counter() - started
            recorder.add(f"store, {chunks} chunks: write", chunks / spent, "chunks/s")
            for kind, wanted in (("with", True), ("without", False)):
                times = []
                for query in embeddings[chance.integers(0, chunks, 50)]:
                    started = perf_counter()
                    store.search(query, top_k, with_memories=wanted)
                    times.append(perf_counter() - started)
                recorder.add(
                    f"store, {chunks} chunks: search, {top_k} {kind} memories",
                    statistics.median(times), "s",
                )  # fmt: skip
            on_disk = store.info().bytes_on_disk
            if on_disk is not None:
                recorder.add(
                    f"store, {chunks} chunks: bytes a chunk", on_disk / chunks, "bytes", raw
                )
            store.delete([_chunk(number).id for number in range(chunks)])


def _chunk(number: int) -> Chunk:
    text = f"Chunk {number} " + "word " * 90
    return Chunk(id=chunk_id("bench", text), text=text, source="bench", n_tokens=128)
