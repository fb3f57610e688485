"""What a collection says of itself, and who may open it. It knows no client and no points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from softrag.errors import MemoryMismatchError, StoreError

FORMAT = 1
METADATA_KEY = "softrag"


@dataclass(frozen=True, kw_only=True)
class StoreRecord:
    """Kept in the collection's metadata, under `softrag`.

    Attributes:
        fingerprint: Of the model whose memories the collection holds.
        embedder: Name of what makes its search embeddings.
        dimension: Of a search embedding.
        codec: Of its memories.
        format: Version of this record and of the payload's layout.
    """

    fingerprint: str
    embedder: str
    dimension: int
    codec: str
    format: int = FORMAT

    def to_metadata(self) -> dict[str, object]:
        """Return the collection metadata that holds this record."""
        return {METADATA_KEY: asdict(self)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object] | None, *, place: str) -> StoreRecord:
        """Read the record of a collection.

        Args:
            metadata: The collection's.
            place: Names the collection in errors.

        Raises:
            StoreError: There is no record, or another softrag wrote it.
        """
        fields = (metadata or {}).get(METADATA_KEY)
        if not isinstance(fields, Mapping):
            raise StoreError(
                f"{place} has no softrag record in its metadata, so softrag did not create it "
                "(or the Qdrant server is older than 1.16, which keeps no metadata). "
                "Choose another collection name, or update the server and index again."
            )
        if fields.get("format") != FORMAT:
            raise StoreError(
                f"{place} is of format {fields.get('format')}; this softrag reads format {FORMAT}. "
                "Install the softrag that wrote it, or index into a new collection."
            )
        try:
            return cls(**fields)
        except TypeError as error:
            raise StoreError(
                f"{place} has an incomplete softrag record, {dict(fields)}. "
                "Index into a new collection."
            ) from error

    def check(
        self,
        *,
        place: str,
        fingerprint: str | None,
        embedder: str | None,
        dimension: int | None,
        codec: str | None,
    ) -> None:
        """Refuse what does not belong to the collection; None is not checked.

        Raises:
            MemoryMismatchError: The model or the embedder is another one.
            StoreError: The codec is another one.
        """
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise MemoryMismatchError(
                f"{place} holds memories of the model {self.fingerprint}, but the loaded model is "
                f"{fingerprint}. Load the model the store was built with, at the same rate, or "
                "index the documents again into a new store."
            )
        if embedder is not None and embedder != self.embedder:
            raise MemoryMismatchError(
                f"{place} was indexed with the embedder {self.embedder}, but the loaded one is "
                f"{embedder}; their search embeddings cannot be compared. Use {self.embedder}, or "
                "index the documents again into a new store."
            )
        if dimension is not None and dimension != self.dimension:
            raise MemoryMismatchError(
                f"{place} holds search embeddings of {self.dimension} dimensions, but the embedder "
                f"makes {dimension}. Use the embedder the store was built with, or index the "
                "documents again into a new store."
            )
        if codec is not None and codec != self.codec:
            raise StoreError(
                f"{place} holds memories encoded as {self.codec}, but {codec} was asked for. "
                "Leave the codec out, or copy the memories into a new store: softrag store migrate "
                "OLD NEW --codec CODEC."
            )


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """What a store is and holds.

    Attributes:
        location: `":memory:"`, a folder or a URL.
        collection: Name of the Qdrant collection.
        chunks: How many it holds.
        fingerprint: Of the model whose memories it holds.
        embedder: Name of what makes its search embeddings.
        dimension: Of a search embedding.
        codec: Of its memories.
        bytes_on_disk: Of the collection; None in memory and on a server.
    """

    location: str
    collection: str
    chunks: int
    fingerprint: str
    embedder: str
    dimension: int
    codec: str
    bytes_on_disk: int | None
