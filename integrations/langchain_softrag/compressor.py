"""Documents get memories: at indexing time, or for a question. It knows no decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, BaseDocumentTransformer, Document
from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict, Field

from langchain_softrag.documents import HANDLE_FIELD, RELEVANCE_FIELD, text_of, to_document
from softrag import Document as SourceDocument
from softrag import SoftRAG, find_handles, make_handle, memory_key


class SoftRAGCompressor(BaseDocumentCompressor, BaseDocumentTransformer):
    """Gives documents the handles of their memories.

    A memory is taken from the engine's cache, or from its store, or made now. A document longer
    than the compressor reads comes back in pieces.

    Use it to answer from any retriever's documents, e.g. in a `ContextualCompressionRetriever`;
    with a query-dependent (OSCAR) checkpoint, memories are made for the question.

    Example:
        .. code-block:: python

            compressor = SoftRAGCompressor(engine=engine)
            store.add_documents(compressor.split_documents(loader.load()))
            compressor.compress_documents(bm25_retriever.invoke(question), question)

    A checkpoint with a rerank head also ranks the documents: they come back the most relevant
    first, with `relevance_score` (0 to 1) in their metadata.

    Args:
        engine: Holds the model, the store and the cache.
        top_n: Keep the first so many, reranked or as they came; None keeps all.
    """

    engine: SoftRAG = Field(exclude=True, repr=False)
    top_n: int | None = Field(default=None, ge=1)

    model_config = ConfigDict(arbitrary_types_allowed=True)

    def split_documents(self, documents: Sequence[Document]) -> list[Document]:
        """Split documents as `softrag index` does, so that each piece is one memory."""
        return [piece for document in documents for piece in self._split(document)]

    def transform_documents(
        self, documents: Sequence[Document], **kwargs: Any
    ) -> Sequence[Document]:
        """Return documents with handles; for checkpoints that need no question.

        Raises:
            ValueError: The checkpoint compresses for a question.
        """
        return self._attach(documents, None)

    async def atransform_documents(
        self, documents: Sequence[Document], **kwargs: Any
    ) -> Sequence[Document]:
        """Do as `transform_documents`, without blocking the event loop."""
        return await run_in_executor(self.engine.threads, self._attach, documents, None)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Return documents with handles of memories, which a query-dependent model makes for it."""
        return self._rank(self._attach(documents, query))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Do as `compress_documents`, without blocking the event loop."""
        return await run_in_executor(self.engine.threads, self.compress_documents, documents, query)

    def _attach(self, documents: Sequence[Document], question: str | None) -> list[Document]:
        engine = self.engine
        pieces = [piece for document in documents for piece in self._fit(document)]
        texts = [text_of(piece) for piece in pieces]
        for_question = None
        if engine.compressor is not None and engine.compressor.query_dependent:
            if question is None:
                raise ValueError(
                    "This checkpoint compresses for a question: use compress_documents, or "
                    "SoftRAGRetriever, which pass it on."
                )
            for_question = question
        fingerprint = engine.store.record.fingerprint
        keys = [memory_key(fingerprint, text, for_question) for text in texts]
        missing = {
            key: (piece, text)
            for key, piece, text in zip(keys, pieces, texts, strict=True)
            if engine.cache.get(key) is None
        }
        if for_question is None:
            ids = [piece.id for piece, _ in missing.values() if piece.id is not None]
            for hit in engine.store.get(ids):
                # The id says where to look; the key, that it is the memory of this very text.
                if hit.memory is not None and hit.memory.key in missing:
                    engine.cache.put(hit.memory)
                    del missing[hit.memory.key]
        if missing:
            self._make([text for _, text in missing.values()], for_question)
        return [
            piece.model_copy(update={"metadata": {**piece.metadata, HANDLE_FIELD: handle}})
            for piece, handle in zip(pieces, map(make_handle, keys), strict=True)
        ]

    def _rank(self, documents: list[Document]) -> list[Document]:
        if self.engine.compressor is not None and self.engine.compressor.reranks:
            documents = [self._with_relevance(document) for document in documents]
            documents.sort(key=lambda document: -document.metadata[RELEVANCE_FIELD])
        return documents[: self.top_n]

    def _with_relevance(self, document: Document) -> Document:
        [key] = find_handles(document.metadata[HANDLE_FIELD])
        [memory] = self.engine.resolve([key])
        return document.model_copy(
            update={"metadata": {**document.metadata, RELEVANCE_FIELD: memory.relevance}}
        )

    def _make(self, texts: list[str], question: str | None) -> None:
        if self.engine.compressor is None:
            raise ValueError(
                f"{len(texts)} documents have no memory in the store and no compressor is loaded "
                "to make it. Load with load_compressor=True, or add them to the store first."
            )
        questions = None if question is None else [question] * len(texts)
        for memory in self.engine.compressor.compress(texts, questions):
            self.engine.cache.put(memory)

    def _fit(self, document: Document) -> list[Document]:
        compressor = self.engine.compressor
        if compressor is None:
            return [document]
        n_tokens = len(compressor.prompt.tokenize(text_of(document)))
        fits = n_tokens <= compressor.model.config.max_document_tokens
        return [document] if fits else self._split(document)

    def _split(self, document: Document) -> list[Document]:
        title, source = (
            value if isinstance(value := document.metadata.get(name), str) else None
            for name in ("title", "source")
        )
        whole = SourceDocument(text=document.page_content, title=title, source=source)
        return [
            # Other metadata may be of any kind, so it does not pass through softrag's chunks.
            Document(page_content=piece.page_content, metadata=document.metadata | piece.metadata)
            for piece in map(to_document, self.engine.split(whole))
        ]
