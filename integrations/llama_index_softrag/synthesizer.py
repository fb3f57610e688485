"""Answering from the memories of retrieved nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks import CallbackManager
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import NodeWithScore, QueryBundle, QueryType, TextNode
from llama_index.core.types import RESPONSE_TEXT_TYPE

from llama_index_softrag.llm import SoftRAGLLM, context_messages
from llama_index_softrag.memories import MemoryNode, in_short_thread, memories_of
from softrag import SoftRAG

ReadMode = Literal["memory", "mixed"]


class SoftRAGSynthesizer(BaseSynthesizer):
    """Answers a question from nodes by their memories, in the prompt the model was trained with.

    Memories come from the store, or are made for nodes that have none. Works wherever LlamaIndex
    takes a `response_synthesizer`: sync, async and streaming.

    Args:
        engine: The engine.
        mode: "memory", or "mixed": the best node is read as text, the others from memories.
        streaming: Answer in pieces.
        max_new_tokens: Most tokens of an answer.
        temperature: 0.0 takes the likeliest token.
        callback_manager: None for the one of LlamaIndex's settings.
        empty_response: The answer when no node was found; None for LlamaIndex's.
    """

    def __init__(
        self,
        engine: SoftRAG,
        *,
        mode: ReadMode = "memory",
        streaming: bool = False,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        callback_manager: CallbackManager | None = None,
        empty_response: str | None = None,
    ) -> None:
        self._decoder = SoftRAGLLM(
            engine, mode=mode, max_new_tokens=max_new_tokens, temperature=temperature
        )
        super().__init__(
            llm=self._decoder,
            callback_manager=callback_manager,
            streaming=streaming,
            empty_response=empty_response,
        )
        self._engine = engine

    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answer a question from nodes.

        Raises:
            MemoryMismatchError: A node's memory was made by another model.
            ValueError: A node has no memory and there is no compressor.
        """
        return super().synthesize(
            query, self._view(query, nodes), additional_source_nodes, **response_kwargs
        )

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Do as `synthesize`, without blocking the event loop."""
        views = await in_short_thread(self._view, query, nodes)
        return await super().asynthesize(query, views, additional_source_nodes, **response_kwargs)

    def get_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """Answer from handles, as `synthesize` gives them, or from texts, compressed now."""
        messages = context_messages(query_str, self._handles(query_str, text_chunks))
        if self._streaming:
            return (piece.delta or "" for piece in self._decoder.stream_chat(messages))
        return self._decoder.chat(messages).message.content or ""

    async def aget_response(
        self, query_str: str, text_chunks: Sequence[str], **response_kwargs: Any
    ) -> RESPONSE_TEXT_TYPE:
        """Do as `get_response`, without blocking the event loop."""
        handles = await in_short_thread(self._handles, query_str, text_chunks)
        messages = context_messages(query_str, handles)
        if self._streaming:
            pieces = await self._decoder.astream_chat(messages)
            return (piece.delta or "" async for piece in pieces)
        response = await self._decoder.achat(messages)
        return response.message.content or ""

    def _view(self, query: QueryType, nodes: Sequence[NodeWithScore]) -> list[NodeWithScore]:
        # A postprocessor may have made them already.
        if all(isinstance(each.node, MemoryNode) for each in nodes):
            return list(nodes)
        question = query.query_str if isinstance(query, QueryBundle) else query
        return memories_of(self._engine).view(nodes, question)

    def _handles(self, question: str, chunks: Sequence[str]) -> list[str]:
        """Return handles for chunks that are plain text."""
        memories = memories_of(self._engine)
        handles: list[str] = []
        for chunk in chunks:
            if memories.is_handle(chunk):
                handles.append(chunk)
                continue
            (view,) = memories.view([NodeWithScore(node=TextNode(text=chunk))], question)
            assert isinstance(view.node, MemoryNode)
            handles.append(view.node.handle)
        return handles

    def _get_prompts(self) -> PromptDictType:
        # The prompt belongs to the checkpoint.
        return {}

    def _update_prompts(self, prompts_dict: PromptDictType) -> None:
        if prompts_dict:
            raise ValueError(
                "SoftRAGSynthesizer asks in the prompt its checkpoint was trained with, so that "
                f"{', '.join(prompts_dict)} cannot be changed."
            )
