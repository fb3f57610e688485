"""Everything softrag raises on purpose, in one tree.

* SoftRAGError
  x CheckpointError          a model folder is damaged, incomplete or of another kind
  x MemoryCodecError         stored memory bytes are damaged or foreign
  x MemoryMismatchError      a memory or store belongs to another model or embedder
  x NonFiniteMemoryError     a compressor produced NaN or infinity
  x PlaceholderMismatchError soft tokens and `<MEM>` placeholders differ in number
  x DecoderError             a decode engine is not there, refused or lost a request
  x StoreError               the vector store refused or lost an operation
    · EmptyStoreError        the store holds nothing to answer from
  x UnknownHandleError       a memory handle is not in the cache or the store
  x UnreadableFileError      a source file cannot be parsed
  x EmptyDocumentError       a document has no text
  x EndpointError            a language model behind a URL cannot be asked
  x MissingExtraError        an optional dependency is not installed (also an ImportError)

Wrong arguments raise plain `ValueError` or `TypeError`.
"""


class SoftRAGError(Exception):
    """Base class of softrag's own errors."""


class CheckpointError(SoftRAGError):
    """A model folder is damaged, incomplete or of another kind."""


class MemoryCodecError(SoftRAGError):
    """Stored memory bytes are damaged or foreign."""


class MemoryMismatchError(SoftRAGError):
    """A memory or store belongs to another model or embedder."""


class NonFiniteMemoryError(SoftRAGError):
    """A compressor produced NaN or infinity."""


class PlaceholderMismatchError(SoftRAGError):
    """Soft tokens and `<MEM>` placeholders differ in number."""


class DecoderError(SoftRAGError):
    """A decode engine is not there, refused or lost a request."""


class StoreError(SoftRAGError):
    """The vector store refused or lost an operation."""


class EmptyStoreError(StoreError):
    """The store holds nothing to answer from."""


class UnknownHandleError(SoftRAGError, KeyError):
    """A memory handle is neither in the cache nor in the store."""

    def __str__(self) -> str:
        """Return the message as written; KeyError would show its repr."""
        return str(self.args[0]) if self.args else ""


class UnreadableFileError(SoftRAGError):
    """A source file cannot be parsed."""


class EmptyDocumentError(SoftRAGError, ValueError):
    """A document has no text."""


class EndpointError(SoftRAGError):
    """A language model behind a URL cannot be reached, refuses, or answers something else."""


class MissingExtraError(SoftRAGError, ImportError):
    """An optional dependency is not installed."""
