"""Compressing in an ingestion pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, MetadataMode, TransformComponent
from llama_index.core.utils import get_tqdm_iterable
from llama_index_instrumentation import get_dispatcher

from llama_index_softrag.convert import attach, carried_memory, title_of
from llama_index_softrag.memories import in_thread
from softrag import Memory, MemoryMismatchError, SoftRAG, document_text

dispatcher = get_dispatcher(__name__)

BATCH_SIZE = 64


class SoftRAGCompressor(TransformComponent):
    """Attaches a memory to every node of an `IngestionPipeline`.

    Put it last, behind the splitter and the embedding model: the pipeline's cache keeps the output
    of every step, and each step behind this one would keep the memories again. Nodes whose memory
    is there already, made of the same text by the same model, are left as they are.

    `SoftRAGQdrantVectorStore` takes the memory out of the metadata and keeps it once; other stores
    keep it with the metadata.

    Args:
        engine: Its compressor makes the memories.
        codec: How they are kept, see `softrag.codec`; None for the codec of the engine's store.
        show_progress: Show a progress bar.

    Raises:
        ValueError: The engine has no compressor, or one that compresses for a question.
    """

    # Decide the result, so they are part of the pipeline's cache key.
    fingerprint: str
    codec: str
    show_progress: bool = Field(default=False, exclude=True)

    _engine: SoftRAG = PrivateAttr()

    def __init__(
        self, engine: SoftRAG, *, codec: str | None = None, show_progress: bool = False
    ) -> None:
        if engine.compressor is None:
            raise ValueError("The engine has no compressor; load it with load_compressor=True.")
        if engine.compressor.query_dependent:
            raise ValueError(
                "This checkpoint compresses for a question, so there is nothing to do before one "
                "is asked. Leave SoftRAGCompressor out; use SoftRAGSynthesizer or "
                "SoftRAGPostprocessor."
            )
        fields: dict[str, Any] = {
            "fingerprint": engine.compressor.fingerprint,
            "codec": codec or engine.store.record.codec,
            "show_progress": show_progress,
        }
        super().__init__(**fields)
        self._engine = engine

    @classmethod
    def class_name(cls) -> str:
        """Return the name LlamaIndex saves."""
        return "SoftRAGCompressor"

    def __getstate__(self) -> dict[str, Any]:
        """Refuse to be sent to other processes."""
        raise TypeError(
            "SoftRAGCompressor holds a loaded model and is not pickled. Run the pipeline with "
            "num_workers=None; compression is batched."
        )

    @dispatcher.span
    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Attach memories and return the nodes.

        Raises:
            EmptyDocumentError: A node has no text.
            ValueError: A node is longer than the compressor reads.
        """
        compressor = self._engine.compressor
        assert compressor is not None
        texts = {node.node_id: node_text(node) for node in nodes}
        stale = [
            node
            for node in nodes
            if not self._is_current(node, compressor.key(texts[node.node_id]))
        ]
        starts = range(0, len(stale), BATCH_SIZE)
        for start in get_tqdm_iterable(starts, self.show_progress, "Compressing"):
            batch = stale[start : start + BATCH_SIZE]
            memories = compressor.compress([texts[node.node_id] for node in batch])
            for node, memory in zip(batch, memories, strict=True):
                attach(node, memory, self.codec)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Do as a call, without blocking the event loop."""
        return await in_thread(self._engine, self.__call__, nodes)

    def _is_current(self, node: BaseNode, key: str) -> bool:
        memory: Memory | None
        try:
            memory = carried_memory(node, fingerprint=self.fingerprint)
        except MemoryMismatchError:
            return False
        return memory is not None and memory.key == key


def node_text(node: BaseNode) -> str:
    """Return a node as it is compressed: its title, if its metadata has one, and its text."""
    return document_text(title_of(node), node.get_content(metadata_mode=MetadataMode.NONE))
