"""Embedders of softrag for LlamaIndex, and LlamaIndex's for softrag."""

from __future__ import annotations

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import PrivateAttr

from llama_index_softrag.memories import in_short_thread, in_thread
from softrag import SoftRAG


class SoftRAGEmbedding(BaseEmbedding):
    """The embedder of an engine as a LlamaIndex embedding model.

    Args:
        engine: The engine; its store can only be searched with its own embedder.
    """

    _engine: SoftRAG = PrivateAttr()

    def __init__(self, engine: SoftRAG) -> None:
        super().__init__(model_name=engine.embedder.name)
        self._engine = engine

    @classmethod
    def class_name(cls) -> str:
        """Return the name LlamaIndex saves."""
        return "SoftRAGEmbedding"

    def _get_query_embedding(self, query: str) -> Embedding:
        return [float(value) for value in self._engine.embedder.embed_query(query)]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        rows: list[Embedding] = self._engine.embedder.embed_documents(texts).tolist()
        return rows

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await in_short_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return await in_thread(self._engine, self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await in_thread(self._engine, self._get_text_embeddings, texts)


class LlamaIndexEmbedder:
    """A LlamaIndex embedding model as the embedder of an engine.

    Give it to `SoftRAG.from_pretrained(..., embedder=...)` to keep the embeddings an app has.

    Args:
        model: Its `model_name` is recorded with the store.
        dimension: Of an embedding; None embeds a word to see.
    """

    def __init__(self, model: BaseEmbedding, dimension: int | None = None) -> None:
        self.model = model
        self.name = model.model_name
        self.dimension = dimension or len(model.get_query_embedding("softrag"))

    def embed_documents(self, texts: list[str]) -> np.ndarray:
        """Return embeddings of texts, `(texts, dimension)` float32."""
        rows = self.model.get_text_embedding_batch(texts)
        return np.asarray(rows, dtype=np.float32).reshape(len(texts), self.dimension)

    def embed_query(self, text: str) -> np.ndarray:
        """Return the embedding of a question, `(dimension,)` float32."""
        return np.asarray(self.model.get_query_embedding(text), dtype=np.float32)
