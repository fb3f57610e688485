"""LangChain's embeddings as softrag's embedder, and back. It knows no store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from langchain_core.embeddings import Embeddings

from softrag import Embedder


class LangChainEmbedder:
    """Finds chunks with any LangChain embeddings: `SoftRAG.from_pretrained(embedder=...)`.

    Args:
        embeddings: What makes the vectors.
        name: Recorded in the store, which refuses another embedder later: the model's name.
        dimension: Of a vector; None asks the embeddings once.
    """

    def __init__(self, embeddings: Embeddings, *, name: str, dimension: int | None = None) -> None:
        self.embeddings = embeddings
        self.name = name
        self.dimension = dimension or len(embeddings.embed_query(name))

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return `(texts, dimension)` float32."""
        return np.asarray(self.embeddings.embed_documents(list(texts)), dtype=np.float32)

    def embed_query(self, text: str) -> np.ndarray:
        """Return `(dimension,)` float32."""
        return np.asarray(self.embeddings.embed_query(text), dtype=np.float32)


class SoftRAGEmbeddings(Embeddings):
    """LangChain embeddings of softrag's embedder.

    Args:
        embedder: What makes the vectors.
    """

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return one vector per text."""
        vectors: list[list[float]] = self.embedder.embed_documents(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a question."""
        vector: list[float] = self.embedder.embed_query(text).tolist()
        return vector


def to_embedder(embeddings: Embeddings) -> Embedder:
    """Return LangChain embeddings as an embedder named after their class and model."""
    if isinstance(embeddings, SoftRAGEmbeddings):
        return embeddings.embedder
    model = getattr(embeddings, "model", None) or getattr(embeddings, "model_name", None)
    name = type(embeddings).__name__
    return LangChainEmbedder(embeddings, name=f"{name}:{model}" if model else name)
