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
N_SOFT = 8  # soft tokens of a chunk
DIMENSION = 384  # of search embeddings
BATCH = 64  # chunks per write
TOP_K = 5  # chunks per search


def bench_store(
    recorder: Recorder,
    *,
    chunks: int,
    hidden: int,
    location: str | None = None,
) -> None:
    """Measure a store of random memories.

    Args:
        recorder: Takes the results.
        chunks: How many to store.
        hidden: Width of a soft token.
        location: As `MemoryStore.open` takes it; None for a temporary folder.
    """
    chance = np.random.default_rng(recorder.seed)
    generator = torch.Generator().manual_seed(recorder.seed)
    with tempfile.TemporaryDirectory() as folder:
        store = MemoryStore.open(
            location or folder, collection="softrag_bench", fingerprint=FINGERPRINT,
            embedder="random", dimension=DIMENSION,
        )  # fmt: skip
        with store:
            embeddings = chance.standard_normal((chunks, DIMENSION)).astype(np.float32)
            embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
            raw = N_SOFT * hidden * 2
            spent = 0.0
            for start in range(0, chunks, BATCH):
                numbers = range(start, min(chunks, start + BATCH))
                written = [_chunk(number) for number in numbers]
                memories = [
                    Memory(
                        values=torch.randn(N_SOFT, hidden, generator=generator).bfloat16(),
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
                    store.search(query, TOP_K, with_memories=wanted)
                    times.append(perf_counter() - started)
                recorder.add(
                    f"store, {chunks} chunks: search, {TOP_K} {kind} memories",
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
