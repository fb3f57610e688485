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


class OnTheDemoEngine:
    @pytest.fixture(autouse=True)
    def _engine(self, demo_engine):
        self.engine = demo_engine


class OfChatSoftRAG(OnTheDemoEngine):
    chat_model_class = ChatSoftRAG
    has_tool_calling = False
    has_structured_output = False

    @property
    def chat_model_params(self):
        return {"engine": self.engine}


class TestChatModelUnit(OfChatSoftRAG, ChatModelUnitTests):
    pass


class TestChatModelIntegration(OfChatSoftRAG, ChatModelIntegrationTests):
    supports_json_mode = False
    supports_model_override = False

    @property
    def standard_chat_model_params(self):
        # A few tokens show as much as a hundred.
        return {**super().standard_chat_model_params, "max_tokens": 6}


class TestRetriever(OnTheDemoEngine, RetrieversIntegrationTests):
    retriever_constructor = SoftRAGRetriever
    retriever_query_example = "Who invented the piano?"

    @property
    def retriever_constructor_params(self):
        return {"vectorstore": SoftRAGQdrantVectorStore(self.engine)}


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
