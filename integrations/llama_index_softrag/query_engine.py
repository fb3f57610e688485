"""The whole of it in one line: a query engine over a softrag store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llama_index.core import VectorStoreIndex
from llama_index.core.callbacks import CallbackManager
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import Document
from llama_index.core.vector_stores.types import MetadataFilters

from llama_index_softrag.convert import to_document
from llama_index_softrag.embedding import SoftRAGEmbedding
from llama_index_softrag.synthesizer import ReadMode, SoftRAGSynthesizer
from llama_index_softrag.vector_store import SoftRAGQdrantVectorStore
from softrag import EmptyDocumentError, SoftRAG


class SoftRAGQueryEngine(RetrieverQueryEngine):
    """LlamaIndex's `RetrieverQueryEngine` with the parts of softrag in it."""

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[Document],
        engine: SoftRAG,
        *,
        k: int = 5,
        filters: MetadataFilters | None = None,
        mode: ReadMode = "memory",
        streaming: bool = False,
        max_new_tokens: int = 128,
        node_postprocessors: Sequence[BaseNodePostprocessor] = (),
        callback_manager: CallbackManager | None = None,
        show_progress: bool = False,
    ) -> SoftRAGQueryEngine:
        """Add documents to the engine's store, as `SoftRAG.add` does, and return a query engine.

        A document replaces what is stored under its id; what is stored already is not compressed
        again.

        Args:
            documents: Documents with stable ids, such as file names.
            engine: The engine.
            k: As in `from_store`.
            filters: As in `from_store`.
            mode: As in `from_store`.
            streaming: As in `from_store`.
            max_new_tokens: As in `from_store`.
            node_postprocessors: As in `from_store`.
            callback_manager: As in `from_store`.
            show_progress: Show a progress bar.

        Raises:
            EmptyDocumentError: A document has no text.
        """
        report = engine.add(map(to_document, documents), show_progress=show_progress)
        if report.errors:
            raise EmptyDocumentError("\n".join(error.message for error in report.errors))
        return cls.from_store(
            engine,
            k=k,
            filters=filters,
            mode=mode,
            streaming=streaming,
            max_new_tokens=max_new_tokens,
            node_postprocessors=node_postprocessors,
            callback_manager=callback_manager,
        )

    @classmethod
    def from_store(
        cls,
        engine: SoftRAG,
        *,
        k: int = 5,
        filters: MetadataFilters | None = None,
        mode: ReadMode = "memory",
        streaming: bool = False,
        max_new_tokens: int = 128,
        node_postprocessors: Sequence[BaseNodePostprocessor] = (),
        callback_manager: CallbackManager | None = None,
    ) -> SoftRAGQueryEngine:
        """Return a query engine over what the engine's store holds, whoever stored it.

        Args:
            engine: The engine.
            k: How many chunks to read.
            filters: Which chunks to consider.
            mode: "memory", or "mixed": the best chunk is read as text, the others from memories.
            streaming: Answer in pieces.
            max_new_tokens: Most tokens of an answer.
            node_postprocessors: Between retrieval and answer.
            callback_manager: None for the one of LlamaIndex's settings.
        """
        return cls(
            retriever=index_of(engine, callback_manager).as_retriever(
                similarity_top_k=k, filters=filters
            ),
            response_synthesizer=SoftRAGSynthesizer(
                engine,
                mode=mode,
                streaming=streaming,
                max_new_tokens=max_new_tokens,
                callback_manager=callback_manager,
            ),
            node_postprocessors=list(node_postprocessors),
            callback_manager=callback_manager,
        )


def index_of(engine: SoftRAG, callback_manager: CallbackManager | None = None) -> VectorStoreIndex:
    """Return a LlamaIndex index over an engine's store."""
    return VectorStoreIndex.from_vector_store(
        SoftRAGQdrantVectorStore(engine),
        embed_model=SoftRAGEmbedding(engine),
        callback_manager=callback_manager,
    )
