"""How a server lays a collection out: shards, replicas, disk and quantisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from softrag.checks import check_count
from softrag.store.connection import qdrant, server_errors

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models


@dataclass(frozen=True, kw_only=True)
class CollectionLayout:
    """How a Qdrant server keeps a new collection. The embedded store has no such choices.

    Memories are payload, which a server keeps on disk and reads for the final k only.

    Attributes:
        shards: Parts of the collection, spread over the nodes; None for the server's own number.
            It cannot be changed later on a self-hosted cluster: take a multiple of the nodes you
            may grow to.
        replicas: Copies of every shard; 2 or more survive the loss of a node.
        write_consistency: Replicas that must have a write before it is acknowledged.
        quantization: Search vectors kept in RAM in fewer bits: `"int8"` (4 times smaller) or
            `"binary"` (32 times; for embeddings of 1,024 dimensions and more). The full vectors
            rescore what is found.
        vectors_on_disk: Keep the full search vectors on disk instead of in RAM; with
            `quantization`, only the small ones stay in RAM.
    """

    shards: int | None = None
    replicas: int = 1
    write_consistency: int = 1
    quantization: Literal["int8", "binary"] | None = None
    vectors_on_disk: bool = False

    def __post_init__(self) -> None:
        if self.shards is not None:
            check_count("shards", self.shards)
        if not 1 <= self.write_consistency <= self.replicas:
            raise ValueError(
                f"write_consistency must be between 1 and the {self.replicas} replicas, found "
                f"{self.write_consistency}."
            )
        if self.quantization not in (None, "int8", "binary"):
            raise ValueError(
                f"quantization is None, 'int8' or 'binary', found {self.quantization!r}."
            )


def create_collection(
    client: QdrantClient,
    collection: str,
    *,
    dimension: int,
    metadata: dict[str, object],
    layout: CollectionLayout | None,
    indexed_fields: Sequence[str],
    embedded: bool,
) -> None:
    """Create a collection of search embeddings.

    Args:
        client: Of an embedded store or a server.
        collection: Its name.
        dimension: Of a search embedding.
        metadata: Kept with the collection.
        layout: On a server; None leaves all to its own settings.
        indexed_fields: Payload fields that a server finds points by.
        embedded: Whether `client` is of an embedded store.
    """
    models = qdrant().models
    # Never for memories, which cosine would normalise: the search embedding is all it is used for.
    # The embedded client works out the length of every vector for every cosine, though they are all
    # stored with length 1; products alone take a quarter of the time (measured at 16,000 chunks).
    distance = models.Distance.DOT if embedded else models.Distance.COSINE
    try:
        client.create_collection(
            collection,
            vectors_config=models.VectorParams(
                size=dimension,
                distance=distance,
                on_disk=True if layout and layout.vectors_on_disk else None,
            ),
            metadata=metadata,
            **_server_options(layout or CollectionLayout()),
        )
    except server_errors():
        # Another process may have created it meanwhile; who is right is checked after this.
        if not client.collection_exists(collection):
            raise
    for field in indexed_fields:
        client.create_payload_index(
            collection, field, field_schema=models.PayloadSchemaType.KEYWORD, wait=True
        )


def _server_options(layout: CollectionLayout) -> dict[str, Any]:
    # What is as the server has it is not sent, so that its own settings hold.
    if layout == CollectionLayout():
        return {}
    return {
        "shard_number": layout.shards,
        "replication_factor": layout.replicas,
        "write_consistency_factor": layout.write_consistency,
        "on_disk_payload": True,
        "quantization_config": _quantization(layout),
    }


def _quantization(layout: CollectionLayout) -> models.QuantizationConfig | None:
    models = qdrant().models
    if layout.quantization == "int8":
        # Without the rarest 1 % of values, which would stretch the 256 levels for all others.
        scalar = models.ScalarQuantizationConfig(
            type=models.ScalarType.INT8, quantile=0.99, always_ram=True
        )
        return models.ScalarQuantization(scalar=scalar)
    if layout.quantization == "binary":
        binary = models.BinaryQuantizationConfig(always_ram=True)
        return models.BinaryQuantization(binary=binary)
    return None
