"""softrag's store as a LlamaIndex vector store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from qdrant_client import QdrantClient

from llama_index_softrag.compressor import node_text
from llama_index_softrag.convert import carried_memory, to_chunk, to_filter, to_node
from llama_index_softrag.memories import in_short_thread, in_thread, memories_of
from softrag import Hit, Memory, SoftRAG, memory_key


class SoftRAGQdrantVectorStore(BasePydanticVectorStore):
    """The Qdrant store of an engine: one point per node, with one copy of its memory.

    It is the store that `softrag index` and `SoftRAG.add` write, so that either side reads what the
    other wrote. Nodes that come without a memory get one when they are added. Retrieved nodes have
    the handle of their memory in `metadata["softrag_memory"]`, never the memory itself.

    Args:
        engine: The engine. Search embeddings must come from its embedder: use
            `SoftRAGEmbedding(engine)`, or load the engine with a `LlamaIndexEmbedder`.
    """

    stores_text: bool = True
    flat_metadata: bool = False
    collection_name: str

    _engine: SoftRAG = PrivateAttr()

    def __init__(self, engine: SoftRAG) -> None:
        fields: dict[str, Any] = {"stores_text": True, "collection_name": engine.store.collection}
        super().__init__(**fields)
        self._engine = engine

    @classmethod
    def class_name(cls) -> str:
        """Return the name LlamaIndex saves."""
        return "SoftRAGQdrantVectorStore"

    @property
    def client(self) -> QdrantClient:
        """The Qdrant client; hold `engine.store.lock` around its use."""
        return self._engine.store.client

    # Writing

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Store nodes, making the memories they lack; one with a known id replaces the old one.

        Raises:
            EmptyDocumentError: A node has no text.
            MemoryMismatchError: A memory was made by another model.
            ValueError: A node is longer than the compressor reads, or of a kind not kept here.
        """
        if not nodes:
            return []
        memories = self._memories(nodes)
        chunks = [to_chunk(node, memory) for node, memory in zip(nodes, memories, strict=True)]
        embeddings = np.asarray([node.get_embedding() for node in nodes], dtype=np.float32)
        self._engine.store.upsert(chunks, embeddings, memories)
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete all nodes of a source document."""
        self._engine.store.delete_source(ref_doc_id)

    def delete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """Delete nodes by id, by filter, or by both together."""
        if node_ids is None and filters is None:
            raise ValueError("Give node_ids or filters; to delete all nodes, call clear().")
        where = to_filter(filters, node_ids=node_ids)
        self._delete(self._engine.store.scroll(where=where, with_memories=False))

    def clear(self) -> None:
        """Delete all nodes."""
        self._delete(self._engine.store.scroll(with_memories=False))

    # Reading

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Return the nearest nodes, best first.

        Raises:
            ValueError: The query is not a search by embedding.
        """
        if query.mode != VectorStoreQueryMode.DEFAULT:
            raise ValueError(
                "This store searches by embedding, not in the mode "
                f"{VectorStoreQueryMode(query.mode).value!r}. Leave vector_store_query_mode out; "
                "for hybrid search give a QueryFusionRetriever this store's retriever and another "
                "one: memories are found for the nodes of both."
            )
        if query.query_embedding is None:
            raise ValueError(
                "The query has no embedding: it is empty, or the index has no embed_model."
            )
        hits = self._engine.store.search(
            np.asarray(query.query_embedding, dtype=np.float32),
            query.similarity_top_k,
            # Retrievers give empty lists for "any".
            where=to_filter(
                query.filters, node_ids=query.node_ids or None, doc_ids=query.doc_ids or None
            ),
        )
        return VectorStoreQueryResult(
            nodes=[self._node(hit) for hit in hits],
            similarities=[hit.score for hit in hits],
            ids=[hit.id for hit in hits],
        )

    def get_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
    ) -> list[BaseNode]:
        """Return nodes by id, by filter, by both together, or all of them."""
        where = to_filter(filters, node_ids=node_ids)
        hits = self._engine.store.scroll(where=where, with_memories=False)
        return [to_node(hit) for hit in hits]

    # Async: the same, in the engine's threads.

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Do as `add`, without blocking the event loop."""
        return await in_thread(self._engine, self.add, nodes)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Do as `delete`, without blocking the event loop."""
        await in_thread(self._engine, self.delete, ref_doc_id)

    async def adelete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """Do as `delete_nodes`, without blocking the event loop."""
        await in_thread(self._engine, self.delete_nodes, node_ids, filters)

    async def aclear(self) -> None:
        """Do as `clear`, without blocking the event loop."""
        await in_thread(self._engine, self.clear)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """Do as `query`, without blocking the event loop."""
        return await in_short_thread(self.query, query)

    async def aget_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
    ) -> list[BaseNode]:
        """Do as `get_nodes`, without blocking the event loop."""
        return await in_thread(self._engine, self.get_nodes, node_ids, filters)

    # Within

    def _memories(self, nodes: Sequence[BaseNode]) -> list[Memory | None]:
        """Return the nodes' memories, made of what they carry or compressed now."""
        fingerprint = self._engine.store.record.fingerprint
        compressor = self._engine.compressor
        if compressor is not None and compressor.query_dependent:
            return [None] * len(nodes)
        memories: list[Memory | None] = []
        for node in nodes:
            memory = carried_memory(node, fingerprint=fingerprint)
            # The text may have been changed after it was compressed.
            is_current = memory and memory.key == memory_key(fingerprint, node_text(node))
            memories.append(memory if is_current else None)
        missing = [place for place, memory in enumerate(memories) if memory is None]
        if missing and compressor is None:
            raise ValueError(
                f"Node {nodes[missing[0]].node_id} has no memory, and no compressor is loaded to "
                "make it. Load the engine with load_compressor=True, or run SoftRAGCompressor "
                "before."
            )
        if missing and compressor is not None:
            made = compressor.compress([node_text(nodes[place]) for place in missing])
            for place, memory in zip(missing, made, strict=True):
                memories[place] = memory
        return memories

    def _node(self, hit: Hit) -> BaseNode:
        if hit.memory is None:
            return to_node(hit)
        memories_of(self._engine).cache.put(hit.memory)
        return to_node(hit, hit.memory.key)

    def _delete(self, hits: Iterable[Hit]) -> None:
        self._engine.store.delete([hit.id for hit in hits])
