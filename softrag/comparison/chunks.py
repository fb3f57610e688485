"""The user's own chunks: found for questions, and drawn to write questions about.

They come as documents, text only: every model and codec of a comparison makes its own memories, of
the very same chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from softrag.compressor import Compressor
from softrag.documents import Document, Hit, document_text
from softrag.embedder import Embedder
from softrag.engine import SoftRAG
from softrag.errors import EmptyStoreError, StoreError
from softrag.evaluation import Question
from softrag.files import read_files
from softrag.store import MemoryStore


class Chunks(Protocol):
    """Where chunks come from.

    Attributes:
        codec: How their memories are, or would be, stored.
    """

    codec: str

    def find(self, question: str, k: int) -> list[Document]:
        """Return the `k` chunks nearest to a question, best first."""
        ...

    def sample(self, n: int, *, seed: int) -> list[Document]:
        """Return `n` distinct chunks at random, fewer where there are fewer."""
        ...


def retrieve_for(questions: Sequence[Question], chunks: Chunks, k: int) -> list[Question]:
    """Return the questions with the `k` nearest chunks as their documents."""
    found = [chunks.find(question.question, k) for question in questions]
    return [
        replace(question, documents=tuple(documents), gold=(False,) * len(documents))
        for question, documents in zip(questions, found, strict=True)
    ]


class StoredChunks:
    """Chunks of a store.

    Args:
        store: A folder or the URL of a server.
        embedder: The one the store was built with.

    Raises:
        MemoryMismatchError: It is another one.
        StoreError: There is no such store; EmptyStoreError: it is empty.
    """

    def __init__(self, store: str | Path, embedder: Embedder) -> None:
        self._embedder = embedder
        self._store = MemoryStore.open(store, embedder=embedder.name, dimension=embedder.dimension)
        self.codec = self._store.record.codec
        self._n_chunks = self._store.count()
        if not self._n_chunks:
            self._store.close()
            raise EmptyStoreError(f"The store {store} is empty. Add documents: softrag index PATH")

    def find(self, question: str, k: int) -> list[Document]:
        """Return the `k` chunks nearest to a question, best first."""
        embedding = self._embedder.embed_query(question)
        return [_document(hit) for hit in self._store.search(embedding, k, with_memories=False)]

    def sample(self, n: int, *, seed: int) -> list[Document]:
        """Return `n` distinct chunks at random, fewer where there are fewer."""
        drawn = set(_draw(self._n_chunks, n, seed))
        hits = enumerate(self._store.scroll(with_memories=False))
        return [_document(hit) for place, hit in hits if place in drawn]

    def __enter__(self) -> StoredChunks:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the store."""
        self._store.close()


class FolderChunks:
    """Chunks of files, split as `softrag index` splits them and held in memory.

    Args:
        folder: A folder or a file.
        embedder: Finds chunks.
        compressor: Its tokenizer measures chunks.

    Raises:
        StoreError: There is no text in the folder.
    """

    codec = "bf16"

    def __init__(self, folder: str | Path, embedder: Embedder, compressor: Compressor) -> None:
        self._embedder = embedder
        documents = [document for file in read_files([folder]) for document in file.documents]
        store = MemoryStore.open(
            ":memory:",
            fingerprint=compressor.fingerprint,
            embedder=embedder.name,
            dimension=embedder.dimension,
        )
        # Only to split: nothing is compressed or stored.
        with SoftRAG(store=store, embedder=embedder, compressor=compressor) as engine:
            self._chunks = [
                Document(text=chunk.text, source=chunk.source, title=chunk.title)
                for document in documents
                if document.text.strip()
                for chunk in engine.split(document)
            ]
        if not self._chunks:
            raise StoreError(f"{folder} holds no text that softrag reads (.txt, .md, .html, .pdf).")
        self._embeddings = embedder.embed_documents(
            [document_text(chunk.title, chunk.text) for chunk in self._chunks]
        )  # (chunks, dimension)

    def find(self, question: str, k: int) -> list[Document]:
        """Return the `k` chunks nearest to a question, best first."""
        similar = self._embeddings @ self._embedder.embed_query(question)
        return [self._chunks[place] for place in np.argsort(-similar, kind="stable")[:k]]

    def sample(self, n: int, *, seed: int) -> list[Document]:
        """Return `n` distinct chunks at random, fewer where there are fewer."""
        return [self._chunks[place] for place in _draw(len(self._chunks), n, seed)]


def _draw(n_chunks: int, n: int, seed: int) -> list[int]:
    generator = np.random.default_rng(seed)
    return generator.choice(n_chunks, size=min(n, n_chunks), replace=False).tolist()


def _document(hit: Hit) -> Document:
    return Document(text=hit.text, source=hit.source, title=hit.title)
