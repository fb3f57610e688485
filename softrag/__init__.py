"""Answer from memories instead of text: RAG with documents compressed into soft tokens.

Names are loaded when they are first used: the models behind some of them take seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softrag.answer import AddError, AddReport, Answer, AnswerStream, Mode, Timings, Usage
    from softrag.asynchronous import AsyncAnswerStream
    from softrag.compressor import Compressor
    from softrag.config import SoftRAGConfig
    from softrag.decoder import Decoder, DecodeRequest, DecodeResult, TorchDecoder, VLLMDecoder
    from softrag.documents import Chunk, Document, Hit, chunk_id, document_text
    from softrag.embedder import Embedder, default_embedder
    from softrag.engine import SoftRAG
    from softrag.errors import (
        CheckpointError,
        DecoderError,
        EmptyDocumentError,
        EmptyStoreError,
        EndpointError,
        MemoryCodecError,
        MemoryMismatchError,
        MissingExtraError,
        NonFiniteMemoryError,
        PlaceholderMismatchError,
        SoftRAGError,
        StoreError,
        UnknownHandleError,
        UnreadableFileError,
    )
    from softrag.handles import MemoryCache, escape_handles, find_handles, make_handle
    from softrag.memory import Memory, memory_key
    from softrag.model import SoftRAGModel
    from softrag.router import Router
    from softrag.store import MemoryStore, StoreInfo, decode_memory, encode_memory
    from softrag.text import clean_text, split_text

__version__ = "0.1.0"

__all__ = [
    "AddError",
    "AddReport",
    "Answer",
    "AnswerStream",
    "AsyncAnswerStream",
    "CheckpointError",
    "Chunk",
    "Compressor",
    "DecodeRequest",
    "DecodeResult",
    "Decoder",
    "DecoderError",
    "Document",
    "Embedder",
    "EmptyDocumentError",
    "EmptyStoreError",
    "EndpointError",
    "Hit",
    "Memory",
    "MemoryCache",
    "MemoryCodecError",
    "MemoryMismatchError",
    "MemoryStore",
    "MissingExtraError",
    "Mode",
    "NonFiniteMemoryError",
    "PlaceholderMismatchError",
    "Router",
    "SoftRAG",
    "SoftRAGConfig",
    "SoftRAGError",
    "SoftRAGModel",
    "StoreError",
    "StoreInfo",
    "Timings",
    "TorchDecoder",
    "UnknownHandleError",
    "UnreadableFileError",
    "Usage",
    "VLLMDecoder",
    "chunk_id",
    "clean_text",
    "decode_memory",
    "default_embedder",
    "document_text",
    "encode_memory",
    "escape_handles",
    "find_handles",
    "make_handle",
    "memory_key",
    "split_text",
]

_HOMES = {
    "answer": ("AddError", "AddReport", "Answer", "AnswerStream", "Mode", "Timings", "Usage"),
    "asynchronous": ("AsyncAnswerStream",),
    "compressor": ("Compressor",),
    "config": ("SoftRAGConfig",),
    "decoder": ("DecodeRequest", "DecodeResult", "Decoder", "TorchDecoder", "VLLMDecoder"),
    "documents": ("Chunk", "Document", "Hit", "chunk_id", "document_text"),
    "embedder": ("Embedder", "default_embedder"),
    "engine": ("SoftRAG",),
    "errors": (
        "CheckpointError",
        "DecoderError",
        "EmptyDocumentError",
        "EmptyStoreError",
        "EndpointError",
        "MemoryCodecError",
        "MemoryMismatchError",
        "MissingExtraError",
        "NonFiniteMemoryError",
        "PlaceholderMismatchError",
        "SoftRAGError",
        "StoreError",
        "UnknownHandleError",
        "UnreadableFileError",
    ),
    "handles": ("MemoryCache", "escape_handles", "find_handles", "make_handle"),
    "memory": ("Memory", "memory_key"),
    "model": ("SoftRAGModel",),
    "router": ("Router",),
    "store": ("MemoryStore", "StoreInfo", "decode_memory", "encode_memory"),
    "text": ("clean_text", "split_text"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - modules hold all kinds
    """Import a public name from the module it lives in."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
