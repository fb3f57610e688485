"""Compressing in ingestion pipelines: caches, docstores, other stores."""

from __future__ import annotations

import pytest
import torch
from llama_index.core import StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.ingestion import DocstoreStrategy, IngestionCache, IngestionPipeline
from llama_index.core.schema import Document, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore

from llama_index_softrag import (
    SoftRAGCompressor,
    SoftRAGEmbedding,
    SoftRAGSplitter,
    SoftRAGSynthesizer,
)
from llama_index_softrag.convert import MEMORY_FIELD, carried_memory
from softrag import EmptyDocumentError, Memory
from tests.families import SENTENCES
from tests.integrations.llama_index.conftest import QUESTION, open_engine
from tests.integrations.llama_index.test_store import FOLDER_DOCUMENTS, pipeline_of


@pytest.fixture
def counted(empty, monkeypatch):
    """The texts the compressor was given, call by call."""
    calls = []
    compress = empty.compressor.compress

    def count(documents, questions=None):
        calls.append(list(documents))
        return compress(documents, questions)

    monkeypatch.setattr(empty.compressor, "compress", count)
    return calls


def steps(softrag):
    return [SoftRAGSplitter(softrag), SoftRAGEmbedding(softrag), SoftRAGCompressor(softrag)]


def test_the_cache_gives_memories_back_bit_identical(empty, counted, tmp_path):
    pipeline = IngestionPipeline(transformations=steps(empty))
    first = pipeline.run(documents=FOLDER_DOCUMENTS)
    pipeline.persist(str(tmp_path))

    again = IngestionPipeline(transformations=steps(empty))
    again.load(str(tmp_path))
    second = again.run(documents=FOLDER_DOCUMENTS)

    assert len(counted) == 1
    for one, other in zip(first, second, strict=True):
        memories = [carried_memory(node, fingerprint=None) for node in (one, other)]
        assert memories[0].key == memories[1].key
        assert torch.equal(memories[0].values, memories[1].values)


def test_cache_keys_are_digests_that_change_with_the_model_and_the_codec(empty):
    cache = IngestionCache()
    IngestionPipeline(transformations=steps(empty), cache=cache).run(documents=FOLDER_DOCUMENTS)

    keys = list(cache.cache.get_all(collection=cache.collection))
    assert len(keys) == 3
    assert all(len(key) == 64 for key in keys)
    description = SoftRAGCompressor(empty, codec="int8", show_progress=True).to_dict()
    assert description == {
        "class_name": "SoftRAGCompressor",
        "fingerprint": empty.compressor.fingerprint,
        "codec": "int8",
    }


def test_upserts_compress_only_what_changed(empty, counted):
    pipeline = pipeline_of(
        empty,
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
        disable_cache=True,
    )
    pipeline.run(documents=FOLDER_DOCUMENTS)
    assert pipeline.run(documents=FOLDER_DOCUMENTS) == []

    changed = Document(id_="notes/1.txt", text="Madrid is the capital of Spain.")
    pipeline.run(documents=[FOLDER_DOCUMENTS[0], changed])

    assert [len(call) for call in counted] == [len(SENTENCES), 1]
    assert {hit.text for hit in empty.store.scroll()} == {SENTENCES[0], changed.text}


def test_another_store_keeps_memories_through_persist_and_reload(empty, tmp_path):
    nodes = IngestionPipeline(transformations=steps(empty)).run(documents=FOLDER_DOCUMENTS)
    made = {node.node_id: carried_memory(node, fingerprint=None) for node in nodes}
    embed_model = SoftRAGEmbedding(empty)
    VectorStoreIndex(nodes, embed_model=embed_model).storage_context.persist(str(tmp_path))

    index = load_index_from_storage(
        StorageContext.from_defaults(persist_dir=str(tmp_path)), embed_model=embed_model
    )
    found = index.as_retriever(similarity_top_k=3).retrieve(QUESTION)

    assert len(found) == 3
    for each in found:
        memory = carried_memory(each.node, fingerprint=empty.compressor.fingerprint)
        assert torch.equal(memory.values, made[each.node_id].values)


def test_memories_of_another_store_are_answered_from_and_leave_the_response(empty, counted):
    nodes = IngestionPipeline(transformations=steps(empty)).run(documents=FOLDER_DOCUMENTS)
    index = VectorStoreIndex(nodes, embed_model=SoftRAGEmbedding(empty))
    found = index.as_retriever(similarity_top_k=2).retrieve(QUESTION)
    made = [carried_memory(each.node, fingerprint=None) for each in found]
    calls = len(counted)

    response = SoftRAGSynthesizer(empty, max_new_tokens=4).synthesize(QUESTION, found)

    used = empty.decoder.requests[-1].documents
    assert [memory.key for memory in used] == [memory.key for memory in made]
    assert all(torch.equal(u.values, m.values) for u, m in zip(used, made, strict=True))
    assert len(counted) == calls
    assert all(len(m[MEMORY_FIELD]) < 50 for m in response.metadata.values())


def test_nodes_of_a_plain_index_are_compressed_when_asked(empty, counted):
    index = VectorStoreIndex(
        [TextNode(text=text) for text in SENTENCES], embed_model=SoftRAGEmbedding(empty)
    )
    found = index.as_retriever(similarity_top_k=2).retrieve(QUESTION)
    synthesizer = SoftRAGSynthesizer(empty, max_new_tokens=4)

    synthesizer.synthesize(QUESTION, found)
    synthesizer.synthesize(QUESTION, found)

    assert counted == [[each.text for each in found]]
    assert all(isinstance(each, Memory) for each in empty.decoder.requests[-1].documents)


def test_a_node_longer_than_the_compressor_reads_is_answered_from_in_pieces(empty):
    node = TextNode(text=" ".join(SENTENCES))
    index = VectorStoreIndex([node], embed_model=SoftRAGEmbedding(empty))

    SoftRAGSynthesizer(empty, max_new_tokens=4).synthesize(
        QUESTION, index.as_retriever().retrieve(QUESTION)
    )

    assert len(empty.decoder.requests[-1].documents) > 1


def test_nodes_with_current_memories_are_left_alone(empty, counted):
    compressor = SoftRAGCompressor(empty)
    nodes = [TextNode(text=text) for text in SENTENCES]
    compressor(nodes)
    nodes[0].text = "A changed text."
    compressor(nodes)

    assert counted == [SENTENCES, ["A changed text."]]


async def test_an_async_pipeline_stores_the_same(empty):
    await pipeline_of(empty).arun(documents=FOLDER_DOCUMENTS)

    assert empty.store.count() == len(SENTENCES)
    assert all(hit.memory is not None for hit in empty.store.scroll())


def test_a_blank_node_is_named(empty):
    with pytest.raises(EmptyDocumentError):
        SoftRAGCompressor(empty)([TextNode(text=" ")])


def test_other_processes_are_refused(empty):
    import pickle

    with pytest.raises(TypeError, match="num_workers=None"):
        pickle.dumps(SoftRAGCompressor(empty))


def test_models_that_compress_for_a_question_are_left_out_of_pipelines():
    with open_engine(query_dependent=True) as oscar:
        with pytest.raises(ValueError, match="Leave SoftRAGCompressor out"):
            SoftRAGCompressor(oscar)
