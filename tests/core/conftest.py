"""Fixtures for tests of the core: a tokenizer of every family, and stubs of a Qdrant server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from softrag.prompt import add_special_tokens
from tests.core.qdrant_grpc_stub import QdrantGrpcStub
from tests.core.qdrant_stub import QdrantStub


@pytest.fixture
def tokenizer(tiny_family: Path) -> PreTrainedTokenizerBase:
    """A base model's tokenizer with softrag's tokens, once for every family."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_family)
    add_special_tokens(tokenizer)
    return tokenizer


@pytest.fixture
def stub() -> Iterator[QdrantStub]:
    """A Qdrant server that speaks HTTP."""
    stub = QdrantStub()
    yield stub
    stub.close()


@pytest.fixture
def grpc_stub() -> Iterator[QdrantGrpcStub]:
    """A Qdrant server that speaks gRPC."""
    stub = QdrantGrpcStub()
    yield stub
    stub.close()
