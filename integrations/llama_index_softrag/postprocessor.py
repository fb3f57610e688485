"""Memories for LlamaIndex's own synthesizers and chat engines."""

from __future__ import annotations

from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher

from llama_index_softrag.memories import memories_of
from softrag import SoftRAG

dispatcher = get_dispatcher(__name__)


class SoftRAGPostprocessor(BaseNodePostprocessor):
    """Gives retrieved nodes their memories, so that any synthesizer answers from them.

    A node's text for a language model becomes the handle of its memory, which `SoftRAGLLM` reads;
    for everything else the node keeps its text. This is what the chat modes "context" and
    "condense_plus_context" need, which bring their own synthesizer. Query-dependent checkpoints
    (OSCAR) compress here, for the question; one with a rerank head also reranks: nodes come back
    the most relevant first, with their relevance (0 to 1) as the score.

    Args:
        engine: The engine.
        top_n: Keep the best by score; None keeps all, reranked or in their order.
    """

    top_n: int | None = Field(default=None, ge=1)

    _engine: SoftRAG = PrivateAttr()

    def __init__(self, engine: SoftRAG, *, top_n: int | None = None) -> None:
        fields: dict[str, Any] = {"top_n": top_n}
        super().__init__(**fields)
        self._engine = engine

    @classmethod
    def class_name(cls) -> str:
        """Return the name LlamaIndex saves."""
        return "SoftRAGPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        memories = memories_of(self._engine)
        if query_bundle is None and memories.query_dependent:
            raise ValueError(
                "This checkpoint compresses for a question: give query_bundle or query_str."
            )
        question = query_bundle.query_str if query_bundle else ""
        top_n = self.top_n or len(nodes)
        dispatcher.event(
            ReRankStartEvent(
                query=query_bundle, nodes=nodes, top_n=top_n, model_name=memories.fingerprint
            )
        )
        with self.callback_manager.event(
            CBEventType.RERANKING,
            payload={
                EventPayload.NODES: nodes,
                EventPayload.MODEL_NAME: memories.fingerprint,
                EventPayload.QUERY_STR: question,
                EventPayload.TOP_K: top_n,
            },
        ) as event:
            kept = nodes
            if memories.reranks:
                kept = memories.rerank(nodes, question)[: self.top_n]
            elif self.top_n is not None:
                # Stable: nodes of equal or no score keep their order.
                kept = sorted(nodes, key=lambda each: -(each.score or 0.0))[: self.top_n]
            views = memories.view(kept, question)
            event.on_end(payload={EventPayload.NODES: views})
        dispatcher.event(ReRankEndEvent(nodes=views))
        return views
