"""Documents with the handles of their memories, from any vector store. It knows no decoder."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.documents import Document
from langchain_core.runnables.config import run_in_executor
from langchain_core.vectorstores import VectorStoreRetriever
from pydantic import model_validator

from langchain_softrag.compressor import SoftRAGCompressor
from softrag import SoftRAG, StoreError


class SoftRAGRetriever(VectorStoreRetriever):
    """Retrieves documents and adds the handles of their memories.

    Over a `SoftRAGQdrantVectorStore` memories come from the store. Over any other vector store
    they are made when a document is first found, and kept in the engine's cache.

    Example:
        .. code-block:: python

            retriever = store.as_retriever(k=3, search_kwargs={"filter": {"lang": "en"}})
            retriever.invoke("Who invented the piano?", k=2)
            other = SoftRAGRetriever(
                vectorstore=any_vector_store, compressor=SoftRAGCompressor(engine=engine)
            )

    Args:
        vectorstore: Finds the documents.
        compressor: Finds or makes their memories; None for that of a `SoftRAGQdrantVectorStore`.
        k: How many documents, unless a call or `search_kwargs` say otherwise.
        search_type: As in every vector store's retriever.
        search_kwargs: As in every vector store's retriever.
    """

    compressor: SoftRAGCompressor | None = None
    k: int = 5

    @model_validator(mode="after")
    def _need_compressor(self) -> SoftRAGRetriever:
        if self.compressor is None:
            engine = getattr(self.vectorstore, "engine", None)
            if not isinstance(engine, SoftRAG):
                raise ValueError(
                    f"{type(self.vectorstore).__name__} holds no memories. Give a compressor: "
                    "SoftRAGRetriever(vectorstore=..., compressor=SoftRAGCompressor(engine=...))."
                )
            self.compressor = SoftRAGCompressor(engine=engine)
        return self

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        assert self.compressor is not None
        if not query.strip():
            raise ValueError("The question is blank; expected some text.")
        if k is None:
            k = self.search_kwargs.get("k", self.k)
        documents = super()._get_relevant_documents(query, run_manager=run_manager, k=k, **kwargs)
        if not documents:
            self._check_not_empty()
        return list(self.compressor.compress_documents(documents, query))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        # The engine's threads, because LangChain's own are too few for many questions at once.
        assert self.compressor is not None
        return await run_in_executor(
            self.compressor.engine.threads,
            self._get_relevant_documents,
            query,
            run_manager=run_manager.get_sync(),
            k=k,
            **kwargs,
        )

    def _check_not_empty(self) -> None:
        engine = getattr(self.vectorstore, "engine", None)
        if isinstance(engine, SoftRAG) and not engine.store.count():
            raise StoreError(
                "The store is empty, so there is nothing to answer from. Add documents first "
                "(add_documents, or `softrag index PATH`)."
            )
