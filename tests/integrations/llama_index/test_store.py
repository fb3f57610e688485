"""Nodes and memories through the store and back."""

from __future__ import annotations

import json
from datetime import datetime, timezone

import pytest
import torch
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import (
    Document,
    IndexNode,
    NodeRelationship,
    NodeWithScore,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters, VectorStoreQuery

from llama_index_softrag import (
    LlamaIndexEmbedder,
    SoftRAGCompressor,
    SoftRAGEmbedding,
    SoftRAGQdrantVectorStore,
    SoftRAGQueryEngine,
    SoftRAGSplitter,
    index_of,
)
from llama_index_softrag.convert import KEY_FIELD, MEMORY_FIELD, attach, carried_memory
from softrag import Document as SoftRAGDocument
from softrag import (
    Memory,
    MemoryMismatchError,
    SoftRAG,
    document_text,
    find_handles,
    memory_key,
)
from tests.checkpoints import build_checkpoint
from tests.families import SENTENCES
from tests.integrations.llama_index.conftest import DOCUMENTS, QUESTION, open_engine

FOLDER_DOCUMENTS = [
    Document(id_=f"notes/{number}.txt", text=text, metadata={"title": f"Note {number}"})
    for number, text in enumerate(SENTENCES)
]


def pipeline_of(softrag, **options) -> IngestionPipeline:
    return IngestionPipeline(
        transformations=[
            SoftRAGSplitter(softrag),
            SoftRAGEmbedding(softrag),
            SoftRAGCompressor(softrag),
        ],
        vector_store=SoftRAGQdrantVectorStore(softrag),
        **options,
    )


def query(softrag, text=QUESTION, k=3, **options):
    embedding = SoftRAGEmbedding(softrag).get_query_embedding(text)
    return SoftRAGQdrantVectorStore(softrag).query(
        VectorStoreQuery(query_embedding=embedding, similarity_top_k=k, **options)
    )


def test_memories_come_back_bit_identical(empty):
    nodes = pipeline_of(empty).run(documents=FOLDER_DOCUMENTS)
    made = {
        node.node_id: carried_memory(node, fingerprint=empty.compressor.fingerprint)
        for node in nodes
    }

    hits = {hit.id: hit for hit in empty.store.scroll()}

    assert set(hits) == set(made)
    for id_, hit in hits.items():
        assert hit.memory.key == made[id_].key
        assert torch.equal(hit.memory.values, made[id_].values)


def test_retrieved_nodes_have_the_handle_and_not_the_memory(softrag):
    found = query(softrag)

    for node in found.nodes:
        assert KEY_FIELD not in node.metadata
        (key,) = find_handles(node.metadata[MEMORY_FIELD])
        expected = document_text(node.metadata["title"], node.text)
        assert key == memory_key(softrag.compressor.fingerprint, expected)
        assert MEMORY_FIELD in node.excluded_embed_metadata_keys
        assert MEMORY_FIELD in node.excluded_llm_metadata_keys


def test_a_memory_of_64_kib_is_kept_once(empty):
    node = TextNode(text="A text.", embedding=[1.0] * 64)
    fingerprint = empty.store.record.fingerprint
    memory = Memory(
        values=torch.randn(8, 4096).to(torch.bfloat16),
        key=memory_key(fingerprint, node.text),
        fingerprint=fingerprint,
        n_document_tokens=3,
    )
    attach(node, memory, "bf16")

    SoftRAGQdrantVectorStore(empty).add([node])

    (record,), _ = empty.store.client.scroll(empty.store.collection, with_payload=True)
    assert memory.nbytes == 64 * 1024
    assert len(json.dumps(record.payload)) <= 1.4 * memory.nbytes
    assert torch.equal(next(empty.store.scroll()).memory.values, memory.values)


def test_a_node_comes_back_as_it_was(empty):
    node = TextNode(
        id_="a node",
        text="The Seine runs through Paris.",
        embedding=[0.5] * 64,
        metadata={"title": "Paris", "year": 1900, "tags": ["river"], "empty": None},
        excluded_llm_metadata_keys=["year"],
        excluded_embed_metadata_keys=["tags"],
        metadata_separator="; ",
        text_template="{metadata_str} | {content}",
        start_char_idx=7,
        end_char_idx=36,
        relationships={
            NodeRelationship.SOURCE: RelatedNodeInfo(node_id="paris.txt", metadata={"year": 1900}),
            NodeRelationship.NEXT: RelatedNodeInfo(node_id="another"),
        },
    )

    store = SoftRAGQdrantVectorStore(empty)
    assert store.add([node]) == ["a node"]
    (back,) = store.get_nodes(["a node"])

    assert back.model_dump(exclude={"embedding"}) == node.model_dump(exclude={"embedding"})


def test_what_softrag_indexed_llama_index_reads(softrag):
    hits = softrag.retrieve(QUESTION, k=3)

    found = query(softrag)

    assert found.ids == [hit.id for hit in hits]
    assert found.similarities == [hit.score for hit in hits]
    assert [node.text for node in found.nodes] == [hit.text for hit in hits]
    assert [node.ref_doc_id for node in found.nodes] == [hit.source for hit in hits]


def test_what_llama_index_indexed_softrag_reads(empty, tmp_path):
    with open_engine(tmp_path / "store") as writer:
        SoftRAGSplitter(writer)
        pipeline_of(writer).run(documents=FOLDER_DOCUMENTS)
    with open_engine(tmp_path / "store") as reader:
        (best, *_) = reader.ask(QUESTION, k=3, max_new_tokens=4).sources
        assert best.source == "notes/2.txt"
        assert best.title == "Note 2"
        assert best.memory is not None
        assert reader.store.sources() == {f"notes/{n}.txt": 1 for n in range(len(SENTENCES))}


def test_both_ways_of_indexing_make_the_same_memories(softrag, empty):
    pipeline_of(empty).run(documents=FOLDER_DOCUMENTS)

    ours = {hit.source: hit.memory.key for hit in softrag.store.scroll()}
    theirs = {hit.source: hit.memory.key for hit in empty.store.scroll()}

    assert ours == theirs


def test_an_index_makes_the_memories_that_nodes_lack(empty):
    index = VectorStoreIndex.from_documents(
        FOLDER_DOCUMENTS,
        storage_context=StorageContext.from_defaults(vector_store=SoftRAGQdrantVectorStore(empty)),
        transformations=[SoftRAGSplitter(empty)],
        embed_model=SoftRAGEmbedding(empty),
    )

    assert all(hit.memory is not None for hit in empty.store.scroll())

    index.insert(Document(id_="new.txt", text="A new text."))
    assert empty.store.ids_of_source("new.txt")
    index.delete_ref_doc("notes/0.txt")
    assert not empty.store.ids_of_source("notes/0.txt")
    index.delete_nodes(list(empty.store.ids_of_source("notes/1.txt")))
    assert empty.store.count() == len(SENTENCES) - 1


def test_a_changed_text_is_never_answered_from_its_old_memory(empty):
    node = TextNode(text="The old text.", embedding=[1.0] * 64)
    SoftRAGCompressor(empty)([node])
    node.text = "The new text."

    SoftRAGQdrantVectorStore(empty).add([node])

    (hit,) = empty.store.scroll()
    assert hit.memory.key == empty.compressor.key("The new text.")


def test_a_memory_of_another_model_is_refused(empty):
    with SoftRAG.from_pretrained(
        build_checkpoint(seed=1), embedder=empty.embedder, device="cpu"
    ) as other:
        (node,) = SoftRAGCompressor(other)([TextNode(text="A text.", embedding=[1.0] * 64)])

    with pytest.raises(MemoryMismatchError, match=other.compressor.fingerprint):
        SoftRAGQdrantVectorStore(empty).add([node])


def test_nodes_of_other_kinds_are_refused(empty):
    node = IndexNode(text="A text.", index_id="1", embedding=[1.0] * 64)

    with pytest.raises(ValueError, match="is a IndexNode; the store keeps TextNodes"):
        SoftRAGQdrantVectorStore(empty).add([node])


def test_nodes_longer_than_the_compressor_reads_are_refused(empty):
    node = TextNode(text="word " * 200, embedding=[1.0] * 64)

    with pytest.raises(ValueError, match="longer than the 64 tokens this compressor reads"):
        SoftRAGQdrantVectorStore(empty).add([node])


def test_a_title_leaves_room_for_the_text(empty):
    document = Document(text=" ".join(SENTENCES), metadata={"title": "A title"})

    nodes = SoftRAGSplitter(empty)([document])

    assert len(nodes) > 1
    assert len(SoftRAGCompressor(empty)(nodes)) == len(nodes)
    assert nodes[1].relationships[NodeRelationship.PREVIOUS].node_id == nodes[0].node_id


def test_an_embedding_model_of_llama_index_can_find_the_chunks():
    class Letters(SoftRAGEmbedding):
        """A model of LlamaIndex that is not softrag's."""

        def __init__(self):
            super(SoftRAGEmbedding, self).__init__(model_name="letters")

        def _get_query_embedding(self, query):
            return [float(query.lower().count(letter)) + 1e-3 for letter in "abcdefgh"]

        def _get_text_embeddings(self, texts):
            return [self._get_query_embedding(text) for text in texts]

    model = Letters()
    with SoftRAG.from_pretrained(
        build_checkpoint(), embedder=LlamaIndexEmbedder(model), device="cpu"
    ) as engine:
        engine.add(DOCUMENTS)

        assert engine.store.record.embedder == "letters"
        assert engine.store.record.dimension == 8
        index = index_of(engine)
        index._embed_model = model
        (best,) = index.as_retriever(similarity_top_k=1).retrieve(SENTENCES[3])
        assert best.node.text == SENTENCES[3]


# Filters


@pytest.fixture(scope="module")
def dated():
    with open_engine() as engine:
        engine.add(
            SoftRAGDocument(
                text=text,
                source=f"{number}.txt",
                title=f"Title {number}",
                metadata={
                    "number": number,
                    "share": number / 4,
                    "even": number % 2 == 0,
                    "kind": "odd one" if number == 3 else "other",
                    "tags": ["all", f"tag {number}"],
                    "day": datetime(2020, 1, 1 + number, tzinfo=timezone.utc).isoformat(),
                    "a.dot": "x" if number == 5 else "y",
                },
            )
            for number, text in enumerate(SENTENCES)
        )
        yield engine


def where(*filters, condition="and"):
    return MetadataFilters(filters=list(filters), condition=condition)


def one(key, operator, value):
    return MetadataFilter(key=key, operator=operator, value=value)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (where(one("number", "==", 3)), {3}),
        (where(one("share", "==", 0.75)), {3}),
        (where(one("number", "!=", 3)), {0, 1, 2, 4, 5, 6, 7}),
        (where(one("number", ">", 5)), {6, 7}),
        (where(one("number", ">=", 5), one("number", "<", 7)), {5, 6}),
        (where(one("number", "<=", 1)), {0, 1}),
        (where(one("day", "<", "2020-01-03T00:00:00+00:00")), {0, 1}),
        (where(one("number", "in", [1, 2, 99])), {1, 2}),
        (where(one("kind", "nin", ["other"])), {3}),
        (where(one("tags", "any", ["tag 1", "tag 2"])), {1, 2}),
        (where(one("tags", "all", ["all", "tag 4"])), {4}),
        (where(one("tags", "contains", "tag 4")), {4}),
        (where(one("kind", "text_match", "odd")), {3}),
        (where(one("missing", "is_empty", None)), set(range(8))),
        (where(one("a.dot", "==", "x")), {5}),
        (where(one("title", "==", "Title 6")), {6}),
        (where(one("ref_doc_id", "==", "6.txt")), {6}),
        (where(one("source", "==", "6.txt")), {6}),
        (where(one("number", "==", 1), one("number", "==", 2), condition="or"), {1, 2}),
        (where(one("number", "<", 6), condition="not"), {6, 7}),
        (where(where(one("number", ">", 2)), where(one("number", "<", 4))), {3}),
    ],
    ids=str,
)
def test_filters_choose_nodes(dated, filters, expected):
    found = query(dated, k=10, filters=filters)

    assert {node.metadata["number"] for node in found.nodes} == expected
    same = SoftRAGQdrantVectorStore(dated).get_nodes(filters=filters)
    assert {node.metadata["number"] for node in same} == expected


def test_an_unknown_operator_is_refused(dated):
    with pytest.raises(ValueError, match="'text_match_insensitive' is not supported"):
        query(dated, filters=where(one("kind", "text_match_insensitive", "odd")))


def test_ids_and_documents_narrow_a_query(dated):
    ids = sorted(dated.store.ids_of_source("1.txt") | dated.store.ids_of_source("2.txt"))

    assert sorted(query(dated, k=9, node_ids=ids).ids) == ids
    assert sorted(query(dated, k=9, doc_ids=["1.txt", "2.txt"]).ids) == ids


def test_a_query_engine_reads_only_what_a_filter_leaves(dated):
    engine = SoftRAGQueryEngine.from_store(
        dated, k=3, filters=where(one("number", "in", [0, 1])), max_new_tokens=2
    )

    response = engine.query(QUESTION)

    assert {each.metadata["number"] for each in response.source_nodes} == {0, 1}


def test_deleting_by_filter_and_clearing(empty):
    empty.add(DOCUMENTS)
    store = SoftRAGQdrantVectorStore(empty)

    store.delete_nodes(filters=where(one("number", "<", 6)))
    assert empty.store.count() == 2
    store.delete_nodes(node_ids=[])
    assert empty.store.count() == 2
    with pytest.raises(ValueError, match="Give node_ids or filters"):
        store.delete_nodes()
    store.clear()
    assert empty.store.count() == 0


async def test_the_async_calls_do_the_same(empty):
    store = SoftRAGQdrantVectorStore(empty)
    embedding = SoftRAGEmbedding(empty)
    nodes = [
        TextNode(id_=str(n), text=text, embedding=await embedding.aget_text_embedding(text))
        for n, text in enumerate(SENTENCES[:4])
    ]

    assert await store.async_add(nodes) == ["0", "1", "2", "3"]
    found = await store.aquery(
        VectorStoreQuery(
            query_embedding=await embedding.aget_query_embedding(SENTENCES[2]), similarity_top_k=1
        )
    )
    assert found.ids == ["2"]
    await store.adelete_nodes(["2"])
    assert {node.node_id for node in await store.aget_nodes()} == {"0", "1", "3"}
    await store.aclear()
    assert await store.aget_nodes() == []


def test_hybrid_search_goes_through_a_fusion_retriever(softrag):
    from llama_index.core.retrievers import BaseRetriever, QueryFusionRetriever

    from llama_index_softrag import SoftRAGLLM, SoftRAGSynthesizer

    class Keywords(BaseRetriever):
        """Finds nodes by a word."""

        def _retrieve(self, query_bundle):
            nodes = SoftRAGQdrantVectorStore(softrag).get_nodes()
            return [NodeWithScore(node=n, score=1.0) for n in nodes if "Amazon" in n.text]

    retriever = QueryFusionRetriever(
        [index_of(softrag).as_retriever(similarity_top_k=2), Keywords()],
        llm=SoftRAGLLM(softrag),
        num_queries=1,
        mode="reciprocal_rerank",
        similarity_top_k=3,
        use_async=False,
    )

    nodes = retriever.retrieve(QUESTION)
    response = SoftRAGSynthesizer(softrag, max_new_tokens=4).synthesize(QUESTION, nodes)

    assert "Amazon" in "".join(each.text for each in nodes)
    assert len(softrag.decoder.requests[-1].documents) == 3
    assert all(isinstance(each, Memory) for each in softrag.decoder.requests[-1].documents)
    assert len(response.source_nodes) == 3


def test_other_query_modes_are_refused(softrag):
    with pytest.raises(ValueError, match="QueryFusionRetriever"):
        query(softrag, mode="hybrid")
