"""LangChain's own suites, on the shipped model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import (
    ChatModelIntegrationTests,
    RetrieversIntegrationTests,
    VectorStoreIntegrationTests,
)
from langchain_tests.unit_tests import ChatModelUnitTests

from langchain_softrag import ChatSoftRAG, SoftRAGQdrantVectorStore, SoftRAGRetriever
from softrag import MemoryStore, SoftRAG


class TestChatModelUnit(ChatModelUnitTests):
    @pytest.fixture(autouse=True)
    def _engine(self, demo_engine):
        self.engine = demo_engine

    @property
    def chat_model_class(self):
        return ChatSoftRAG

    @property
    def chat_model_params(self):
        return {"engine": self.engine}

    @property
    def has_tool_calling(self):
        return False

    @property
    def has_structured_output(self):
        return False


class TestChatModelIntegration(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _engine(self, demo_engine):
        self.engine = demo_engine

    @property
    def chat_model_class(self):
        return ChatSoftRAG

    @property
    def chat_model_params(self):
        return {"engine": self.engine}

    @property
    def standard_chat_model_params(self):
        # A few tokens show as much as a hundred.
        return {**super().standard_chat_model_params, "max_tokens": 6}

    @property
    def has_tool_calling(self):
        return False

    @property
    def has_structured_output(self):
        return False

    @property
    def supports_json_mode(self):
        return False

    @property
    def supports_model_override(self):
        return False


class TestRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def _engine(self, demo_engine):
        self.engine = demo_engine

    @property
    def retriever_constructor(self):
        return SoftRAGRetriever

    @property
    def retriever_constructor_params(self):
        return {"vectorstore": SoftRAGQdrantVectorStore(self.engine)}

    @property
    def retriever_query_example(self):
        return "Who invented the piano?"


class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, demo_engine) -> Iterator[VectorStore]:
        record = demo_engine.store.record
        store = MemoryStore.open(
            ":memory:",
            fingerprint=record.fingerprint,
            embedder=record.embedder,
            dimension=record.dimension,
        )
        with SoftRAG(
            store=store, embedder=demo_engine.embedder, compressor=demo_engine.compressor
        ) as engine:
            yield SoftRAGQdrantVectorStore(engine)
