"""LlamaIndex's nodes and filters as softrag's chunks and filters, and back. It knows no model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.schema import (
    BaseNode,
    Document,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)
from qdrant_client import models

from softrag import Chunk, Hit, Memory, decode_memory, encode_memory, make_handle
from softrag import Document as SoftRAGDocument

KEY_FIELD = "softrag_key"
MEMORY_FIELD = "softrag_memory"
"""In `node.metadata`: before a store the encoded memory, after retrieval only its handle."""

# What a node has beside its text and metadata, kept in the chunk's metadata.
NODE_FIELD = "llama_index_node"
_NODE_ATTRIBUTES = {
    "relationships",
    "excluded_embed_metadata_keys",
    "excluded_llm_metadata_keys",
    "metadata_template",
    "metadata_separator",
    "text_template",
    "start_char_idx",
    "end_char_idx",
    "mimetype",
}
_OWN_FIELDS = (KEY_FIELD, MEMORY_FIELD, NODE_FIELD)


def to_document(document: Document) -> SoftRAGDocument:
    """Return a LlamaIndex document as softrag's; its id becomes the source."""
    return SoftRAGDocument(
        text=document.get_content(metadata_mode=MetadataMode.NONE),
        source=document.node_id,
        title=_title(document.metadata),
        metadata=_user_metadata(document),
    )


def to_chunk(node: BaseNode, memory: Memory | None) -> Chunk:
    """Return a node as the chunk that holds it in a store.

    Raises:
        ValueError: The node is of a kind that would come back as another one.
    """
    if node.class_name() not in ("TextNode", "Document"):
        raise ValueError(
            f"Node {node.node_id} is a {node.class_name()}; the store keeps TextNodes. Put other "
            "nodes into a store of their own."
        )
    attributes = node.model_dump(mode="json", include=_NODE_ATTRIBUTES)
    for related in attributes["relationships"].values():
        for each in related if isinstance(related, list) else [related]:
            # Splitters and parsers copy metadata into relations: once is enough for a memory.
            each["metadata"] = _without_own(each["metadata"])
    return Chunk(
        id=node.node_id,
        text=node.get_content(metadata_mode=MetadataMode.NONE),
        source=node.ref_doc_id,
        title=_title(node.metadata),
        metadata={**_user_metadata(node), NODE_FIELD: json.dumps(attributes)},
        n_tokens=memory.n_document_tokens if memory else 0,
        start=getattr(node, "start_char_idx", None) or 0,
    )


def to_node(hit: Hit, handle_key: str | None = None) -> TextNode:
    """Return a stored chunk as a node, with the handle of its memory in the metadata.

    Chunks that softrag itself stored become nodes too: their source is the `ref_doc_id`.
    """
    metadata: dict[str, Any] = dict(hit.metadata)
    attributes = metadata.pop(NODE_FIELD, None)
    if hit.title is not None:
        metadata["title"] = hit.title
    node = TextNode(id_=hit.id, text=hit.text, metadata=metadata)
    if isinstance(attributes, str):
        node = TextNode.model_validate(
            {**json.loads(attributes), "id_": hit.id, "text": hit.text, "metadata": metadata}
        )
    else:
        node.start_char_idx = hit.start
        node.end_char_idx = hit.start + len(hit.text)
        if hit.source is not None:
            node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=hit.source)
    if handle_key is not None:
        put_in_metadata(node, {MEMORY_FIELD: make_handle(handle_key)})
    return node


def to_hit(scored: NodeWithScore) -> Hit:
    """Return a retrieved node as a hit; the memory it may carry is left out."""
    node = scored.node
    return Hit(
        id=node.node_id,
        text=node.get_content(metadata_mode=MetadataMode.NONE),
        source=node.ref_doc_id,
        title=_title(node.metadata),
        metadata=_user_metadata(node),
        score=scored.score or 0.0,
    )


def attach(node: BaseNode, memory: Memory, codec: str) -> None:
    """Put an encoded memory into a node's metadata, out of sight of models and embedders."""
    put_in_metadata(node, encode_memory(memory, codec))


def carried_memory(node: BaseNode, *, fingerprint: str | None) -> Memory | None:
    """Return the encoded memory in a node's metadata; None when there is none, or a handle.

    Raises:
        MemoryCodecError: It is damaged.
        MemoryMismatchError: It belongs to another model than `fingerprint`.
    """
    # A handle is short and names its memory; only an encoded memory brings its key along.
    if KEY_FIELD not in node.metadata:
        return None
    return decode_memory(node.metadata, fingerprint=fingerprint)


def put_in_metadata(node: BaseNode, fields: Mapping[str, str]) -> None:
    """Add fields to a node's metadata that neither a model nor an embedder reads."""
    node.metadata = {**node.metadata, **fields}
    for excluded in (node.excluded_embed_metadata_keys, node.excluded_llm_metadata_keys):
        excluded += [name for name in fields if name not in excluded]


def drop_memory(node: BaseNode) -> None:
    """Take the encoded memory out of a node's metadata."""
    node.metadata = _without_own(node.metadata)


def title_of(node: BaseNode) -> str | None:
    """Return the title a node is compressed with."""
    return _title(node.metadata)


def _title(metadata: Mapping[str, Any]) -> str | None:
    title = metadata.get("title")
    return title if isinstance(title, str) and title else None


def _user_metadata(node: BaseNode) -> dict[str, Any]:
    metadata = _without_own(node.model_dump(mode="json", include={"metadata"})["metadata"])
    if _title(metadata) is not None:
        del metadata["title"]
    return metadata


def _without_own(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name not in _OWN_FIELDS}


# Filters


def to_filter(
    filters: MetadataFilters | None,
    *,
    node_ids: Sequence[str] | None = None,
    doc_ids: Sequence[str] | None = None,
) -> models.Filter | None:
    """Return LlamaIndex's filters as a Qdrant filter on the payload of a softrag store.

    Args:
        filters: On metadata; `title`, and `doc_id`, `ref_doc_id` or `source` for where a node
            comes from.
        node_ids: Ids of which a node must have one; None for any.
        doc_ids: As `node_ids`, of its source document.
    """
    must: list[models.Condition] = []
    if node_ids is not None:
        must.append(_match_any("chunk_id", list(node_ids)))
    if doc_ids is not None:
        must.append(_match_any("source", list(doc_ids)))
    if filters is not None and filters.filters:
        must.append(_group(filters))
    return models.Filter(must=must) if must else None


def _group(filters: MetadataFilters) -> models.Filter:
    conditions: list[models.Condition] = [
        _group(each) if isinstance(each, MetadataFilters) else _one(each)
        for each in filters.filters
    ]
    if filters.condition == FilterCondition.OR:
        return models.Filter(should=conditions)
    if filters.condition == FilterCondition.NOT:
        return models.Filter(must_not=conditions)
    return models.Filter(must=conditions)


_OPPOSITES = {FilterOperator.NE: FilterOperator.EQ, FilterOperator.NIN: FilterOperator.IN}
_RANGES = {
    FilterOperator.GT: "gt",
    FilterOperator.GTE: "gte",
    FilterOperator.LT: "lt",
    FilterOperator.LTE: "lte",
}


def _one(condition: MetadataFilter) -> models.Filter:
    opposite = _OPPOSITES.get(condition.operator)
    if opposite is not None:
        same = condition.model_copy(update={"operator": opposite})
        return models.Filter(must_not=[_one(same)])
    paths = _paths(condition.key)
    return models.Filter(should=[_at(path, condition.operator, condition.value) for path in paths])


def _paths(key: str) -> list[str]:
    """Return where in the payload a key may stand."""
    if key in ("doc_id", "ref_doc_id", "document_id"):
        return ["source"]
    if key == "title":
        return ["title"]
    # Quoted, because a dot in a key would otherwise lead into nested values.
    own = f'metadata."{key}"'
    return [own, "source"] if key == "source" else [own]


def _at(path: str, operator: FilterOperator, value: Any) -> models.Condition:  # noqa: ANN401
    values = value if isinstance(value, list) else [value]
    if operator in (FilterOperator.EQ, FilterOperator.CONTAINS):
        return _match(path, value)
    if operator in (FilterOperator.IN, FilterOperator.ANY):
        return models.Filter(should=[_match(path, each) for each in values])
    if operator == FilterOperator.ALL:
        return models.Filter(must=[_match(path, each) for each in values])
    if operator in _RANGES:
        bound = {_RANGES[operator]: value}
        if isinstance(value, str):  # a date
            return models.FieldCondition(key=path, range=models.DatetimeRange.model_validate(bound))
        return models.FieldCondition(key=path, range=models.Range.model_validate(bound))
    if operator == FilterOperator.TEXT_MATCH:
        return models.FieldCondition(key=path, match=models.MatchText(text=str(value)))
    if operator == FilterOperator.IS_EMPTY:
        return models.IsEmptyCondition(is_empty=models.PayloadField(key=path))
    raise ValueError(
        f"The filter operator {operator.value!r} is not supported; use one of ==, !=, >, >=, <, "
        "<=, in, nin, any, all, contains, text_match, is_empty."
    )


def _match(path: str, value: Any) -> models.Condition:  # noqa: ANN401
    if isinstance(value, float):  # Qdrant matches no floats, but has ranges of them
        return models.FieldCondition(key=path, range=models.Range(gte=value, lte=value))
    return models.FieldCondition(key=path, match=models.MatchValue(value=value))


def _match_any(path: str, values: list[str]) -> models.Condition:
    return models.FieldCondition(key=path, match=models.MatchAny(any=values))
