"""Documents with their memories in Qdrant, behind LangChain's vector store. It knows no decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from langchain_softrag.documents import text_of, to_chunk, to_document
from langchain_softrag.embeddings import SoftRAGEmbeddings, to_embedder
from langchain_softrag.retrievers import SoftRAGRetriever
from softrag import Hit, Memory, SoftRAG


class SoftRAGQdrantVectorStore(VectorStore):
    """A vector store that keeps a memory beside each document.

    It is the engine's own store: what `softrag index` or `SoftRAG.add` wrote is found here, and
    the other way round. Memories are made inside `add_documents`; documents come back clean, and
    `as_retriever` adds the handles of their memories.

    Example:
        .. code-block:: python

            engine = SoftRAG.from_pretrained("softrag/demo/checkpoint", store="./my_store")
            store = SoftRAGQdrantVectorStore(engine)
            store.add_documents(documents, ids=["any", "string"])
            store.similarity_search("Who invented the piano?", k=3, filter={"lang": "en"})
            retriever = store.as_retriever(k=3)
            store.delete(["any"])

    Args:
        engine: Holds the store, the embedder and the compressor.
    """

    def __init__(self, engine: SoftRAG) -> None:
        self.engine = engine

    @classmethod
    def from_texts(  # type: ignore[override]
        cls,
        texts: list[str],
        embedding: Embeddings | None = None,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        checkpoint: str | Path,
        location: str | Path = ":memory:",
        load_decoder: bool = True,
    ) -> SoftRAGQdrantVectorStore:
        """Load a checkpoint, open a store and add texts.

        Args:
            texts: What to store.
            embedding: Finds them; None for softrag's own embedder.
            metadatas: One per text.
            ids: One per text; None for content addresses.
            checkpoint: As `SoftRAG.from_pretrained` takes it.
            location: As its `store`.
            load_decoder: False when nothing will be answered with `engine`.
        """
        engine = SoftRAG.from_pretrained(
            checkpoint,
            store=location,
            embedder=None if embedding is None else to_embedder(embedding),
            load_decoder=load_decoder,
        )
        store = cls(engine)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    @property
    def embeddings(self) -> Embeddings:
        """The engine's embedder."""
        return SoftRAGEmbeddings(self.engine.embedder)

    def as_retriever(self, **kwargs: Any) -> SoftRAGRetriever:
        """Return a retriever whose documents carry the handles of their memories."""
        tags = [*(kwargs.pop("tags", None) or []), type(self).__name__]
        return SoftRAGRetriever(vectorstore=self, tags=tags, **kwargs)

    # Writing

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        batch_size: int = 64,
        **kwargs: Any,
    ) -> list[str]:
        """Compress and store texts; what the store has already is not compressed again.

        Args:
            texts: Each short enough for the compressor; see `SoftRAGCompressor.split_documents`.
            metadatas: One per text; `source` and `title` become softrag's own.
            ids: Any strings; a known id is replaced. None for content addresses.
            batch_size: Texts stored at a time.
            kwargs: None are known.

        Returns:
            The ids, in order.

        Raises:
            ValueError: A text is too long, or there are not as many ids or metadatas as texts.
        """
        if kwargs:
            raise TypeError(f"add_texts knows no {', '.join(kwargs)}.")
        texts = list(texts)
        for name, given in (("metadatas", metadatas), ("ids", ids)):
            if given is not None and len(given) != len(texts):
                raise ValueError(f"Found {len(given)} {name} for {len(texts)} texts.")
        documents = [
            Document(id=id_, page_content=text, metadata=metadata)
            for text, metadata, id_ in zip(
                texts,
                metadatas or [{} for _ in texts],
                ids or [None] * len(texts),
                strict=True,
            )
        ]
        return [
            id_
            for start in range(0, len(documents), batch_size)
            for id_ in self._add(documents[start : start + batch_size])
        ]

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Delete documents with their memories; unknown ids are ignored.

        Args:
            ids: None deletes everything.
            kwargs: None are known.
        """
        if kwargs:
            raise TypeError(f"delete knows no {', '.join(kwargs)}.")
        store = self.engine.store
        if ids is None:
            ids = [hit.id for hit in store.scroll(with_memories=False)]
        store.delete(ids)
        return True

    # Reading

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Return documents by id, in order; unknown ids are left out."""
        return [to_document(hit) for hit in self.engine.store.get(ids, with_memories=False)]

    def similarity_search(
        self,
        query: str,
        k: int = 4,
        filter: Mapping[str, Any] | object | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Return the documents nearest to a question, best first.

        Args:
            query: What to look for.
            k: How many.
            filter: Metadata that documents must have: a value or a list of allowed ones each; or
                a `qdrant_client.models.Filter` over `metadata.<key>`.
            kwargs: None are known.
        """
        return [
            document
            for document, _ in self.similarity_search_with_score(query, k, filter, **kwargs)
        ]

    def similarity_search_with_score(
        self,
        query: str,
        k: int = 4,
        filter: Mapping[str, Any] | object | None = None,
        **kwargs: Any,
    ) -> list[tuple[Document, float]]:
        """Do as `similarity_search`, with cosine similarities."""
        return self.similarity_search_with_score_by_vector(
            self.engine.embedder.embed_query(query), k, filter, **kwargs
        )

    def similarity_search_by_vector(
        self,
        embedding: Sequence[float] | np.ndarray,
        k: int = 4,
        filter: Mapping[str, Any] | object | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Do as `similarity_search`, with the question's embedding."""
        found = self.similarity_search_with_score_by_vector(embedding, k, filter, **kwargs)
        return [document for document, _ in found]

    def similarity_search_with_score_by_vector(
        self,
        embedding: Sequence[float] | np.ndarray,
        k: int = 4,
        filter: Mapping[str, Any] | object | None = None,
        **kwargs: Any,
    ) -> list[tuple[Document, float]]:
        """Do as `similarity_search_with_score`, with the question's embedding."""
        if kwargs:
            raise TypeError(f"Searching knows no {', '.join(kwargs)}.")
        return [(to_document(hit), hit.score) for hit in self._search(embedding, k, filter)]

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Mapping[str, Any] | object | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Return near documents that differ from each other.

        Args:
            query: What to look for.
            k: How many to return.
            fetch_k: How many of the nearest to choose from; they are embedded again.
            lambda_mult: 1 for the nearest, 0 for the most different.
            filter: As in `similarity_search`.
            kwargs: None are known.
        """
        embedding = self.engine.embedder.embed_query(query)
        return self.max_marginal_relevance_search_by_vector(
            embedding, k, fetch_k, lambda_mult, filter, **kwargs
        )

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: Sequence[float] | np.ndarray,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: Mapping[str, Any] | object | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Do as `max_marginal_relevance_search`, with the question's embedding."""
        found = self.similarity_search_by_vector(embedding, fetch_k, filter, **kwargs)
        if not found:
            return []
        vectors = self.engine.embedder.embed_documents([text_of(document) for document in found])
        chosen = maximal_marginal_relevance(
            np.asarray(embedding), list(vectors), lambda_mult=lambda_mult, k=k
        )
        return [found[place] for place in chosen]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        # Cosine similarities, -1 to 1, as LangChain's relevance, 0 to 1.
        return lambda similarity: (similarity + 1) / 2

    def _search(self, embedding: Any, k: int, filter: Any) -> list[Hit]:  # noqa: ANN401
        store = self.engine.store
        return store.search(np.asarray(embedding), k, where=filter, with_memories=False)

    def _add(self, documents: list[Document]) -> list[str]:
        compressor = self.engine.compressor
        if compressor is None:
            raise ValueError("To add documents, load the engine with load_compressor=True.")
        texts = [text_of(document) for document in documents]
        chunks = [
            to_chunk(document, n_tokens=len(compressor.prompt.tokenize(text)))
            for document, text in zip(documents, texts, strict=True)
        ]
        # The last of equal ids stays, as it would if they were stored one by one.
        new = {chunk.id: (chunk, text) for chunk, text in zip(chunks, texts, strict=True)}
        memories: dict[str, Memory] = {}
        for hit in self.engine.store.get(list(new)):
            chunk, text = new[hit.id]
            if hit.memory is None or hit.memory.key != compressor.key(text):
                continue
            memories[hit.memory.key] = hit.memory
            if to_document(hit) == to_document(chunk):
                del new[hit.id]
        if new and not compressor.query_dependent:
            made = [text for _, text in new.values() if compressor.key(text) not in memories]
            memories |= {memory.key: memory for memory in compressor.compress(made)}
        if new:
            self.engine.store.upsert(
                [chunk for chunk, _ in new.values()],
                self.engine.embedder.embed_documents([text for _, text in new.values()]),
                # A query-dependent model makes its memories when it is asked.
                [memories.get(compressor.key(text)) for _, text in new.values()],
            )
        return [chunk.id for chunk in chunks]
