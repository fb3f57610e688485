"""Splitting as softrag does it: pieces that the compressor reads whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.node_parser.interface import NodeParser
from llama_index.core.node_parser.node_utils import build_nodes_from_splits
from llama_index.core.schema import BaseNode, MetadataMode
from llama_index.core.utils import get_tqdm_iterable

from llama_index_softrag.convert import title_of
from softrag import SoftRAG, clean_text, document_text, split_text


class SoftRAGSplitter(NodeParser):
    """Splits documents into nodes that fit the compressor, with the title each node repeats.

    Args:
        engine: Its compressor measures the pieces.
        chunk_tokens: Most compressor tokens in a node and its title; None for the engine's.
    """

    chunk_tokens: int = Field(ge=1)

    _engine: SoftRAG = PrivateAttr()

    def __init__(self, engine: SoftRAG, chunk_tokens: int | None = None) -> None:
        fields: dict[str, Any] = {"chunk_tokens": chunk_tokens or engine.chunk_tokens}
        super().__init__(**fields)
        if engine.compressor is None:
            raise ValueError("Splitting measures in the compressor's tokens; load_compressor=True.")
        self._engine = engine

    @classmethod
    def class_name(cls) -> str:
        """Return the name LlamaIndex saves."""
        return "SoftRAGSplitter"

    def _parse_nodes(
        self,
        nodes: Sequence[BaseNode],
        show_progress: bool = False,
        **kwargs: Any,
    ) -> list[BaseNode]:
        pieces: list[BaseNode] = []
        for node in get_tqdm_iterable(nodes, show_progress, "Splitting"):
            texts = self._split(node)
            pieces += build_nodes_from_splits(texts, node, id_func=self.id_func)
        return pieces

    def _split(self, node: BaseNode) -> list[str]:
        compressor = self._engine.compressor
        assert compressor is not None
        room = self.chunk_tokens
        title = title_of(node)
        if title is not None:
            taken = len(compressor.prompt.tokenize(document_text(title, "")))
            # In steps, because each length of piece needs a splitter, which takes long to build.
            step = max(1, self.chunk_tokens // 8)
            room = self.chunk_tokens - -(-taken // step) * step
        if room < 1:
            raise ValueError(
                f"The title of {node.node_id} leaves no room in nodes of {self.chunk_tokens} "
                "tokens. Shorten metadata['title'], or raise chunk_tokens."
            )
        text = clean_text(node.get_content(metadata_mode=MetadataMode.NONE))
        return [piece.text for piece in split_text(text, compressor.prompt.tokenizer, room)]
