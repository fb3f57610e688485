"""Chunks with memories of their own, and stores for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from softrag.documents import Chunk, chunk_id
from softrag.memory import Memory, memory_key
from softrag.store import MemoryStore

MODEL = "f" * 32
DIMENSION = 4


def make_chunk(text: str, *, source: str | None = "a.md", **metadata: object) -> Chunk:
    return Chunk(
        id=chunk_id(source, text),
        text=text,
        source=source,
        title=f"On {text}",
        metadata=metadata,
        n_tokens=len(text),
        start=7,
    )


def make_memory(chunk: Chunk) -> Memory:
    """A memory as its text decides it, so that what comes back can be told from its chunk."""
    generator = torch.Generator().manual_seed(sum(chunk.text.encode()))
    return Memory(
        values=torch.randn(2, 6, generator=generator).bfloat16(),
        key=memory_key(MODEL, chunk.text),
        fingerprint=MODEL,
        n_document_tokens=chunk.n_tokens,
    )


def make_embeddings(chunks: list[Chunk]) -> np.ndarray:
    rows = [np.random.default_rng(list(chunk.id.encode())).normal(size=4) for chunk in chunks]
    return np.array(rows, dtype=np.float32)


def add(store: MemoryStore, *chunks: Chunk) -> None:
    store.upsert(
        list(chunks), make_embeddings(list(chunks)), [make_memory(chunk) for chunk in chunks]
    )


def same(memory: Memory | None, expected: Memory) -> bool:
    return (
        memory is not None
        and torch.equal(memory.values, expected.values)
        and memory.key == expected.key
        and memory.n_document_tokens == expected.n_document_tokens
    )


ALPHA = make_chunk("alpha", lang="en", year=1815, weight=0.5, draft=True, tags=["x", "y"])
BETA = make_chunk("beta", lang="fr", year=1852, weight=1.5, draft=False)
GAMMA = make_chunk("gamma", source="b.md", lang="en", **{"a.b": 1})
DELTA = make_chunk("delta", source=None)
ALL = (ALPHA, BETA, GAMMA, DELTA)


def open_at(place: str | Path, **changes: object) -> MemoryStore:
    options = {"fingerprint": MODEL, "embedder": "minilm", "dimension": DIMENSION}
    return MemoryStore.open(place, **{**options, **changes})
