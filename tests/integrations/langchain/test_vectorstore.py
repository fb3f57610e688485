"""Documents with their memories in the store, through LangChain's interface."""

from __future__ import annotations

import asyncio

import pytest
import torch
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, index
from langchain_core.vectorstores import InMemoryVectorStore
from qdrant_client import models

import softrag
from langchain_softrag import (
    LangChainEmbedder,
    SoftRAGCompressor,
    SoftRAGEmbeddings,
    SoftRAGQdrantVectorStore,
    SoftRAGRetriever,
)
from langchain_softrag.embeddings import to_embedder
from softrag import MemoryMismatchError, SoftRAG, StoreError, find_handles, make_handle
from tests.checkpoints import build_checkpoint
from tests.embedders import HashingEmbedder
from tests.families import SENTENCES
from tests.integrations.langchain.conftest import open_engine

PARIS, HAMLET, WATER = SENTENCES[1:4]
FOREIGN = make_handle("0" * 32)


def documents(*texts: str) -> list[Document]:
    return [
        Document(page_content=text, metadata={"source": f"{n}.txt", "number": n})
        for n, text in enumerate(texts)
    ]


@pytest.fixture
def compressed(store, monkeypatch):
    """The texts that the compressor was given."""
    texts: list[str] = []
    compress = store.engine.compressor.compress

    def counting(pieces, questions=None):
        texts.extend(pieces)
        return compress(pieces, questions)

    monkeypatch.setattr(store.engine.compressor, "compress", counting)
    return texts


# Writing


def test_stored_memories_are_the_compressors_own(store):
    [id_] = store.add_texts([PARIS])

    [hit] = store.engine.store.get([id_])
    [memory] = store.engine.compressor.compress([PARIS])
    assert torch.equal(hit.memory.values, memory.values)
    assert hit.memory.key == memory.key


def test_documents_come_back_clean_and_whole(store):
    metadata = {"source": "a.txt", "title": "Paris", "page": 3, "tags": ["x"], "nested": {"a": 1}}
    store.add_documents([Document(id="a/b#1", page_content=PARIS, metadata=metadata)])

    [found] = store.similarity_search("Seine", k=1)
    assert found == Document(id="a/b#1", page_content=PARIS, metadata=metadata)
    assert store.get_by_ids(["a/b#1", "none"]) == [found]


def test_a_source_that_is_no_text_stays_metadata(store):
    store.add_texts([PARIS], [{"source": 7}], ids=["1"])

    assert store.get_by_ids(["1"])[0].metadata == {"source": 7}


def test_one_copy_of_the_memory_at_the_top_of_the_payload(store):
    store.add_texts([PARIS])

    database = store.engine.store
    [point] = database.client.scroll(database.collection, with_payload=True)[0]
    large = [key for key, value in point.payload.items() if len(str(value)) > 200]
    assert large == ["softrag_memory"]


def test_ids_default_to_those_of_the_index_command(store):
    text = PARIS

    [id_] = store.add_documents([Document(page_content=text, metadata={"source": "a.txt"})])

    assert id_ == softrag.chunk_id("a.txt", text)
    report = store.engine.add([softrag.Document(text=text, source="a.txt")])
    assert (report.chunks_added, report.chunks_unchanged) == (0, 1)


def test_adding_again_compresses_nothing(store, compressed):
    store.add_documents(documents(PARIS, HAMLET))
    store.add_documents(documents(PARIS, HAMLET))

    assert compressed == [PARIS, HAMLET]
    assert store.engine.store.count() == 2


def test_new_metadata_keeps_the_memory_and_new_text_makes_another(store, compressed):
    store.add_texts([PARIS], [{"v": 1}], ids=["a"])
    store.add_texts([PARIS], [{"v": 2}], ids=["a"])
    assert compressed == [PARIS]
    assert store.get_by_ids(["a"])[0].metadata == {"v": 2}

    store.add_texts([WATER], [{"v": 2}], ids=["a"])

    assert compressed == [PARIS, WATER]
    assert [hit.text for hit in store.engine.store.scroll()] == [WATER]


def test_the_last_of_equal_ids_stays(store):
    assert store.add_texts([PARIS, WATER], ids=["a", "a"]) == ["a", "a"]

    assert [document.page_content for document in store.get_by_ids(["a"])] == [WATER]


def test_deleting_takes_the_memory_too(store):
    ids = store.add_texts([PARIS, HAMLET, WATER])
    key = store.engine.compressor.key(PARIS)

    store.delete(ids[:1])
    assert store.engine.store.memories([key]) == {}
    assert store.engine.store.count() == 2

    store.delete()
    assert store.engine.store.count() == 0


@pytest.mark.parametrize("encoder", ["sha256", "sha1", "blake2b"])
@pytest.mark.filterwarnings("ignore:Using SHA-1:UserWarning")  # LangChain's own advice
def test_index_is_idempotent_whatever_hashes_it(store, compressed, encoder):
    manager = InMemoryRecordManager("test")
    manager.create_schema()

    def run(*texts):
        result = index(
            documents(*texts),
            manager,
            store,
            cleanup="full",
            source_id_key="source",
            key_encoder=encoder,
        )
        return result["num_added"], result["num_skipped"], result["num_deleted"]

    assert run(PARIS, HAMLET, WATER) == (3, 0, 0)
    assert run(PARIS, HAMLET, WATER) == (0, 3, 0)
    assert run(PARIS, HAMLET) == (0, 2, 1)
    assert run(PARIS, WATER) == (1, 1, 1)
    assert compressed == [PARIS, HAMLET, WATER, WATER]


def test_a_text_that_is_too_long_is_refused_and_nothing_is_stored(store):
    long = " ".join(SENTENCES)

    with pytest.raises(ValueError, match="Split it first"):
        store.add_texts([PARIS, long])

    assert store.engine.store.count() == 0


def test_metadata_that_json_cannot_hold_is_named(store):
    with pytest.raises(ValueError, match="'when' is a object"):
        store.add_texts([PARIS], [{"when": object()}])


def test_unknown_arguments_are_refused(store):
    with pytest.raises(TypeError, match="filters"):
        store.similarity_search("x", filters={})
    with pytest.raises(TypeError, match="compressor"):
        store.add_texts([PARIS], compressor=None)
    with pytest.raises(ValueError, match="Found 1 ids for 2 texts"):
        store.add_texts([PARIS, WATER], ids=["a"])


def test_from_texts_opens_a_folder_that_the_engine_reads(tmp_path):
    embedding = DeterministicFakeEmbedding(size=8)
    store = SoftRAGQdrantVectorStore.from_texts(
        [PARIS, WATER],
        embedding,
        [{"n": 1}, {"n": 2}],
        checkpoint=build_checkpoint(),
        location=tmp_path / "store",
    )
    store.engine.close()

    with SoftRAG.from_pretrained(
        build_checkpoint(), store=tmp_path / "store", embedder=to_embedder(embedding)
    ) as engine:
        [hit] = engine.retrieve(PARIS, k=1)
    assert (hit.text, hit.metadata, hit.memory.key) == (
        PARIS,
        {"n": 1},
        engine.compressor.key(PARIS),
    )


def test_another_embedder_is_refused(tmp_path):
    open_engine(tmp_path).close()

    with pytest.raises(MemoryMismatchError, match="hashing-64"):
        SoftRAG.from_pretrained(
            build_checkpoint(),
            store=tmp_path,
            embedder=LangChainEmbedder(DeterministicFakeEmbedding(size=64), name="fake"),
        )


def test_embeddings_go_both_ways():
    embedder = HashingEmbedder()
    embeddings = SoftRAGEmbeddings(embedder)

    assert embeddings.embed_query("Paris") == embedder.embed_query("Paris").tolist()
    assert embeddings.embed_documents(["Paris"]) == [embeddings.embed_query("Paris")]
    assert to_embedder(embeddings) is embedder
    assert LangChainEmbedder(embeddings, name="x").dimension == 64


# Reading


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"number": 1}, {HAMLET}),
        ({"number": [0, 2]}, {PARIS, WATER}),
        ({"source": "2.txt"}, {WATER}),
        ({"number": 9}, set()),
        (
            models.Filter(
                must=[models.FieldCondition(key="metadata.number", range=models.Range(gte=1))]
            ),
            {HAMLET, WATER},
        ),
    ],
)
def test_filters(store, where, expected):
    store.add_documents(documents(PARIS, HAMLET, WATER))

    found = store.similarity_search("the", k=9, filter=where)
    retrieved = store.as_retriever(search_kwargs={"filter": where}).invoke("the")

    assert {document.page_content for document in found} == expected
    assert {document.page_content for document in retrieved} == expected


def test_scores_relevance_and_diversity(store):
    store.add_documents(documents(PARIS, HAMLET, WATER))

    scored = store.similarity_search_with_score("Paris capital France Seine", k=3)
    assert scored[0][0].page_content == PARIS
    assert [score for _, score in scored] == sorted((s for _, s in scored), reverse=True)
    [(_, relevance)] = store.similarity_search_with_relevance_scores("Paris capital France", k=1)
    assert 0.5 < relevance <= 1
    different = store.max_marginal_relevance_search("Paris capital France", k=2, lambda_mult=0.1)
    assert different[0].page_content == PARIS
    assert len(different) == 2


def test_what_the_engine_indexed_is_found_with_its_memories(engine):
    store = SoftRAGQdrantVectorStore(engine)

    [found] = store.as_retriever(k=1).invoke("Who wrote Hamlet?")

    [hit] = engine.retrieve("Who wrote Hamlet?", k=1)
    assert (found.id, found.page_content) == (hit.id, hit.text)
    assert found.metadata == {
        "number": 2,
        "source": "2.txt",
        "softrag_memory": make_handle(hit.memory.key),
    }


def test_what_langchain_indexed_is_found_by_the_engine(store):
    store.add_documents(documents(PARIS, HAMLET))

    [hit] = store.engine.retrieve("Who wrote Hamlet?", k=1)

    assert (hit.text, hit.source, hit.metadata) == (HAMLET, "1.txt", {"number": 1})
    assert hit.memory.key == store.engine.compressor.key(HAMLET)


def test_a_handle_in_stored_metadata_is_dropped(store):
    store.add_texts([PARIS], [{"softrag_memory": FOREIGN}], ids=["a"])
    store.engine.add([softrag.Document(text=WATER, metadata={"softrag_memory": FOREIGN})])

    assert store.get_by_ids(["a"])[0].metadata == {}
    assert all("softrag_memory" not in d.metadata for d in store.similarity_search("a", k=2))
    for found in store.as_retriever().invoke("water Paris"):
        assert found.metadata["softrag_memory"] == make_handle(
            store.engine.compressor.key(found.page_content)
        )


# Retriever and compressor


def test_a_retriever_compresses_nothing_that_is_stored(store, compressed):
    store.add_documents(documents(PARIS, HAMLET))

    store.as_retriever(k=2).invoke("Who wrote Hamlet?")

    assert compressed == [PARIS, HAMLET]
    assert len(store.engine.cache) == 2


def test_any_vector_store_gets_memories_once(store, compressed):
    other = InMemoryVectorStore(SoftRAGEmbeddings(store.engine.embedder))
    other.add_texts([PARIS, HAMLET])
    retriever = SoftRAGRetriever(
        vectorstore=other, compressor=SoftRAGCompressor(engine=store.engine), k=1
    )

    first, second = (retriever.invoke("Who wrote Hamlet?") for _ in range(2))

    assert first == second
    assert find_handles(first[0].metadata["softrag_memory"]) == [
        store.engine.compressor.key(HAMLET)
    ]
    assert compressed == [HAMLET]
    with pytest.raises(ValueError, match="InMemoryVectorStore holds no memories"):
        SoftRAGRetriever(vectorstore=other)


def test_k_of_the_call_goes_before_search_kwargs_before_the_field(store):
    store.add_documents(documents(PARIS, HAMLET, WATER))

    assert len(store.as_retriever(k=2).invoke("a")) == 2
    assert len(store.as_retriever(k=2, search_kwargs={"k": 1}).invoke("a")) == 1
    assert len(store.as_retriever(k=2, search_kwargs={"k": 1}).invoke("a", k=3)) == 3


@pytest.mark.parametrize(
    ("search_type", "kwargs"),
    [("mmr", {"fetch_k": 3}), ("similarity_score_threshold", {"score_threshold": 0.1})],
)
def test_every_search_type_brings_handles(store, search_type, kwargs):
    store.add_documents(documents(PARIS, HAMLET, WATER))

    found = store.as_retriever(search_type=search_type, search_kwargs=kwargs, k=2).invoke("Paris")

    assert [bool(find_handles(d.metadata["softrag_memory"])) for d in found] == [True, True]


def test_an_empty_store_says_so(store):
    with pytest.raises(StoreError, match="store is empty"):
        store.as_retriever().invoke("Paris")


def test_long_documents_are_split_as_the_engine_splits_them(store):
    compressor = SoftRAGCompressor(engine=store.engine)
    whole = Document(
        page_content=" ".join(SENTENCES), metadata={"source": "all.txt", "object": (1, 2)}
    )

    pieces = compressor.split_documents([whole])

    chunks = store.engine.split(softrag.Document(text=whole.page_content, source="all.txt"))
    assert [piece.page_content for piece in pieces] == [chunk.text for chunk in chunks]
    assert all(p.metadata == {"source": "all.txt", "object": (1, 2)} for p in pieces)
    assert len(compressor.transform_documents([whole])) == len(pieces) > 1
    with (
        pytest.raises(ValueError, match="load_compressor=True"),
        open_engine(load_compressor=False) as engine,
    ):
        SoftRAGCompressor(engine=engine).transform_documents([whole])


def test_a_query_dependent_model_makes_memories_for_each_question():
    with open_engine(query_dependent=True) as engine:
        store = SoftRAGQdrantVectorStore(engine)
        store.add_texts([PARIS])
        compressor = SoftRAGCompressor(engine=engine)

        [one] = compressor.compress_documents(store.similarity_search("a", k=1), "Where is Paris?")
        [two] = store.as_retriever().invoke("What is the Seine?")

        keys = [find_handles(found.metadata["softrag_memory"])[0] for found in (one, two)]
        assert keys == [
            engine.compressor.key(PARIS, "Where is Paris?"),
            engine.compressor.key(PARIS, "What is the Seine?"),
        ]
        assert len(engine.resolve(keys)) == 2
        with pytest.raises(ValueError, match="compresses for a question"):
            compressor.transform_documents([one])


async def test_a_rerank_head_sorts_documents_and_says_how_relevant_they_are():
    with open_engine(query_dependent=True, rerank=True) as engine:
        store = SoftRAGQdrantVectorStore(engine)
        store.add_texts(SENTENCES)
        question = "Where is Paris?"
        found = store.similarity_search(question, k=5)
        texts = [document.page_content for document in found]
        memories = engine.compressor.compress(texts, [question] * 5)
        relevance = {text: m.relevance for text, m in zip(texts, memories, strict=True)}
        best = sorted(texts, key=lambda text: -relevance[text])
        assert best != texts

        every = SoftRAGCompressor(engine=engine).compress_documents(found, question)
        kept = await SoftRAGCompressor(engine=engine, top_n=2).acompress_documents(found, question)

        assert [document.page_content for document in every] == best
        assert [document.metadata["relevance_score"] for document in every] == pytest.approx(
            [relevance[text] for text in best], rel=1e-3
        )
        assert kept == every[:2]
        assert "relevance_score" not in found[0].metadata


def test_top_n_keeps_the_first_documents_of_a_model_that_does_not_rerank(store):
    store.add_texts(SENTENCES)
    found = store.similarity_search("Where is Paris?", k=3)

    kept = SoftRAGCompressor(engine=store.engine, top_n=2).compress_documents(found, "?")

    assert [document.id for document in kept] == [document.id for document in found[:2]]


async def test_everything_works_async(store):
    await asyncio.gather(
        *(store.aadd_texts([text], ids=[str(n)]) for n, text in enumerate(SENTENCES))
    )
    assert store.engine.store.count() == len(SENTENCES)

    found = await store.asimilarity_search("Who wrote Hamlet?", k=1)
    assert found[0].page_content == HAMLET
    retrieved = await asyncio.gather(
        *(store.as_retriever(k=1).ainvoke("Who wrote Hamlet?") for _ in range(32))
    )
    assert all(documents == retrieved[0] for documents in retrieved)
    compressor = SoftRAGCompressor(engine=store.engine)
    assert await compressor.acompress_documents(found, "?") == retrieved[0]
    assert await compressor.atransform_documents(found) == retrieved[0]
    await store.adelete(["0"])
    assert await store.aget_by_ids(["0"]) == []
