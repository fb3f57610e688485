"""One contract for every place a store can be; then what only a folder or a server can show."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from qdrant_client import QdrantClient, models

from softrag.codec import encode
from softrag.documents import Chunk
from softrag.errors import (
    MemoryCodecError,
    MemoryMismatchError,
    NonFiniteMemoryError,
    StoreError,
)
from softrag.store import MemoryStore
from softrag.store import collection as collection_module
from softrag.store import points as points_module
from softrag.store import qdrant as store_module
from softrag.store.payload import KEY_FIELD, MEMORY_FIELD
from softrag.store.points import point_id
from tests.core.qdrant_grpc_stub import QdrantGrpcStub
from tests.core.qdrant_stub import QdrantStub
from tests.core.stored_chunks import (
    ALL,
    ALPHA,
    BETA,
    DELTA,
    DIMENSION,
    GAMMA,
    MODEL,
    add,
    make_chunk,
    make_embeddings,
    make_memory,
    open_at,
    same,
)

Open = Callable[..., MemoryStore]


@pytest.fixture(params=["memory", "folder", "http", "grpc", "server"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the test's own collection; what is open at the end is closed."""
    collection = "softrag"
    defaults = {"fingerprint": MODEL, "embedder": "minilm", "dimension": DIMENSION}
    if request.param == "server":
        location = os.environ.get("SOFTRAG_TEST_QDRANT_URL")
        if location is None:
            pytest.skip("SOFTRAG_TEST_QDRANT_URL names no Qdrant server")
        collection = f"softrag-test-{uuid.uuid4().hex}"
    elif request.param == "http":
        location = request.getfixturevalue("stub").url
    elif request.param == "grpc":
        grpc_stub = request.getfixturevalue("grpc_stub")
        location = grpc_stub.url
        defaults |= {"prefer_grpc": True, "grpc_port": grpc_stub.port}
    else:
        location = ":memory:" if request.param == "memory" else str(tmp_path / "store")

    with contextlib.ExitStack() as opened:

        def open_it(**changes: object) -> MemoryStore:
            options = {"collection": collection, **defaults, **changes}
            return opened.enter_context(MemoryStore.open(location, **options))

        yield open_it
        if request.param == "server":
            with contextlib.closing(QdrantClient(location, check_compatibility=False)) as client:
                client.delete_collection(collection)


@pytest.fixture
def store(open_store: Open) -> MemoryStore:
    return open_store()


# Storing


def test_what_is_stored_comes_back_bit_for_bit(store: MemoryStore) -> None:
    add(store, *ALL)

    for chunk in ALL:
        (hit,) = store.get([chunk.id])
        assert same(hit.memory, make_memory(chunk))
        assert replace(hit, memory=None) == replace(
            hit,
            id=chunk.id,
            text=chunk.text,
            source=chunk.source,
            title=chunk.title,
            metadata=chunk.metadata,
            n_tokens=chunk.n_tokens,
            start=7,
            score=0.0,
            memory=None,
        )


def test_storing_the_same_content_again_changes_nothing(store: MemoryStore) -> None:
    add(store, ALPHA, BETA)
    add(store, ALPHA)

    assert store.count() == 2


def test_a_known_id_is_replaced(store: MemoryStore) -> None:
    add(store, ALPHA)
    add(store, replace(ALPHA, title="New", metadata={"lang": "de"}))

    (hit,) = store.get([ALPHA.id])
    assert (hit.title, dict(hit.metadata)) == ("New", {"lang": "de"})


def test_contains_tells_what_needs_no_compressing(store: MemoryStore) -> None:
    add(store, ALPHA, BETA)

    assert store.contains([ALPHA.id, GAMMA.id, BETA.id]) == {ALPHA.id, BETA.id}
    assert store.contains([]) == set()


def test_a_chunk_may_have_its_memory_made_later(store: MemoryStore) -> None:
    store.upsert([ALPHA], make_embeddings([ALPHA]), [None])

    (hit,) = store.search(make_embeddings([ALPHA])[0], 1)
    assert hit.id == ALPHA.id
    assert hit.memory is None


def test_ids_and_texts_may_be_anything(store: MemoryStore) -> None:
    chunk = replace(ALPHA, id="my id / 1", text='Ünïcode 漢字 🙂 "quoted" \x00 <MEM>', source="ä b")
    add(store, chunk)

    (hit,) = store.get(["my id / 1"])
    assert (hit.id, hit.text, hit.source) == (chunk.id, chunk.text, chunk.source)


def test_storing_nothing_is_fine(store: MemoryStore) -> None:
    store.upsert([], np.zeros((0, DIMENSION), dtype=np.float32), [])

    assert store.count() == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_bad_embedding_and_nothing_is_stored(store: MemoryStore, value: float) -> None:
    embeddings = make_embeddings([ALPHA, BETA])
    embeddings[1, 2] = value

    with pytest.raises(ValueError, match=r"embeddings \[1\] hold NaN or infinity"):
        store.upsert([ALPHA, BETA], embeddings, [make_memory(ALPHA), make_memory(BETA)])
    assert store.count() == 0


def test_one_bad_memory_and_nothing_is_stored(store: MemoryStore) -> None:
    bad = replace(make_memory(BETA), values=torch.tensor([[1.0, float("nan")]]))

    with pytest.raises(NonFiniteMemoryError, match=bad.key):
        store.upsert([ALPHA, BETA], make_embeddings([ALPHA, BETA]), [make_memory(ALPHA), bad])
    assert store.count() == 0


def test_a_memory_of_another_model_is_not_stored(store: MemoryStore) -> None:
    foreign = replace(make_memory(BETA), fingerprint="a" * 32)

    with pytest.raises(MemoryMismatchError, match=r"a{32}.* holds memories of f{32}"):
        store.upsert([BETA], make_embeddings([BETA]), [foreign])
    assert store.count() == 0


def test_shapes_and_numbers_must_agree(store: MemoryStore) -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 3\); expected \(1, 4\)"):
        store.upsert([ALPHA], np.zeros((1, 3)), [make_memory(ALPHA)])
    with pytest.raises(ValueError, match="1 memories for 2 chunks"):
        store.upsert([ALPHA, BETA], make_embeddings([ALPHA, BETA]), [make_memory(ALPHA)])
    with pytest.raises(ValueError, match=r"shape \(1, 3\)"):
        store.search(np.zeros(3), 1)


# Searching


def test_the_nearest_come_first_with_their_cosine(store: MemoryStore) -> None:
    embeddings = np.array([[2, 0, 0, 0], [3, 4, 0, 0], [0, 0, 5, 0]], dtype=np.float32)
    store.upsert([ALPHA, BETA, GAMMA], embeddings, [make_memory(c) for c in ALL[:3]])

    hits = store.search(np.array([10.0, 0, 0, 0]), 3)

    assert [hit.id for hit in hits] == [ALPHA.id, BETA.id, GAMMA.id]
    assert [hit.score for hit in hits] == pytest.approx([1.0, 0.6, 0.0], abs=1e-6)
    assert all(same(h.memory, make_memory(c)) for h, c in zip(hits, ALL[:3], strict=True))


def test_memories_can_be_left_out(store: MemoryStore) -> None:
    add(store, *ALL)
    embedding = make_embeddings([ALPHA])[0]

    without = store.search(embedding, 4, with_memories=False)

    assert [hit.memory for hit in without] == [None] * 4
    assert [hit.id for hit in without] == [hit.id for hit in store.search(embedding, 4)]
    assert store.get([ALPHA.id], with_memories=False)[0].memory is None


def test_a_k_larger_than_the_store_returns_all(store: MemoryStore) -> None:
    add(store, *ALL)

    assert {hit.id for hit in store.search(np.ones(4), 100)} == {chunk.id for chunk in ALL}


def test_an_empty_store_finds_nothing(store: MemoryStore) -> None:
    assert store.search(np.ones(4), 5) == []
    assert store.get([ALPHA.id]) == []
    assert list(store.scroll()) == []
    assert store.sources() == {}
    assert store.memories([make_memory(ALPHA).key]) == {}


def test_k_is_at_least_one(store: MemoryStore) -> None:
    with pytest.raises(ValueError, match="k must be at least 1, found 0"):
        store.search(np.ones(4), 0)


FILTERS = [
    ({}, ALL),
    ({"lang": "en"}, [ALPHA, GAMMA]),
    ({"lang": ["en", "fr"]}, [ALPHA, BETA, GAMMA]),
    ({"lang": []}, []),
    ({"lang": "en", "year": 1815}, [ALPHA]),
    ({"year": [1815, 1852]}, [ALPHA, BETA]),
    ({"year": [1815, "1852"]}, [ALPHA]),
    ({"weight": 1.5}, [BETA]),
    ({"weight": [0.5, 1.5]}, [ALPHA, BETA]),
    ({"draft": False}, [BETA]),
    ({"draft": [True, False]}, [ALPHA, BETA]),
    ({"tags": "y"}, [ALPHA]),
    ({"lang": None}, [DELTA]),
    ({"a.b": 1}, [GAMMA]),
    ({"source": "a.md"}, [ALPHA, BETA]),
    ({"source": ["a.md", "b.md"]}, [ALPHA, BETA, GAMMA]),
    ({"source": None}, [DELTA]),
    ({"title": "On beta"}, [BETA]),
    ({"missing": "x"}, []),
]


@pytest.mark.parametrize(
    ("where", "expected"), FILTERS, ids=[repr(where) for where, expected in FILTERS]
)
def test_a_filter_chooses_chunks(
    store: MemoryStore, where: dict[str, object], expected: list[Chunk]
) -> None:
    add(store, *ALL)

    found = store.search(np.ones(4), 10, where=where)

    assert {hit.text for hit in found} == {chunk.text for chunk in expected}
    assert store.count(where) == len(expected)
    assert {hit.text for hit in store.scroll(where=where)} == {chunk.text for chunk in expected}


def test_a_qdrant_filter_is_taken_as_it_is(store: MemoryStore) -> None:
    add(store, *ALL)
    later = models.FieldCondition(key="metadata.year", range=models.Range(gt=1815))

    assert store.count(models.Filter(must=[later])) == 1
    assert store.count(models.Filter(must_not=[later])) == 3


@pytest.mark.parametrize(
    "where", [{"": 1}, {1: 1}, {'a"b': 1}, {"lang": {"nested": 1}}, {"lang": b"en"}]
)
def test_what_cannot_be_filtered_on_is_named(store: MemoryStore, where: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="cannot be"):
        store.count(where)


# Looking up


def test_chunks_come_in_the_order_asked_for(store: MemoryStore) -> None:
    add(store, *ALL)

    ids = [GAMMA.id, "unknown", ALPHA.id]
    assert [hit.id for hit in store.get(ids)] == [GAMMA.id, ALPHA.id]


def test_scrolling_yields_every_chunk_once(store: MemoryStore) -> None:
    chunks = [make_chunk(f"text {i}") for i in range(23)]
    add(store, *chunks)

    hits = list(store.scroll(batch_size=5))

    assert sorted(hit.id for hit in hits) == sorted(chunk.id for chunk in chunks)
    by_id = {chunk.id: chunk for chunk in chunks}
    assert all(same(hit.memory, make_memory(by_id[hit.id])) for hit in hits)


def test_sources_are_counted(store: MemoryStore) -> None:
    uuid_like = make_chunk("epsilon", source="0" * 32)  # Qdrant's facets would rewrite it
    add(store, *ALL, uuid_like)

    assert store.sources() == {"0" * 32: 1, "a.md": 2, "b.md": 1}
    assert store.ids_of_source("a.md") == {ALPHA.id, BETA.id}
    assert store.ids_of_source("unknown") == set()
    assert store.ids_of_sources(["b.md", "0" * 32]) == {
        "b.md": {GAMMA.id},
        "0" * 32: {uuid_like.id},
    }


def test_memories_are_found_by_key_even_when_chunks_share_one(store: MemoryStore) -> None:
    copy = make_chunk("alpha", source="copy.md")
    add(store, ALPHA, copy, BETA)
    alpha, beta = make_memory(ALPHA), make_memory(BETA)

    found = store.memories([alpha.key, beta.key, "0" * 32])

    assert found.keys() == {alpha.key, beta.key}
    assert same(found[alpha.key], alpha)
    assert same(found[beta.key], beta)


def test_lookups_of_many_are_split(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (collection_module, store_module):
        monkeypatch.setattr(module, "MAX_LOOKUP", 3)
    chunks = [make_chunk(f"text {i}") for i in range(10)]
    add(store, *chunks)
    ids = [chunk.id for chunk in chunks]

    assert store.contains(ids) == set(ids)
    assert [hit.id for hit in store.get(ids)] == ids
    assert len(store.memories([make_memory(chunk).key for chunk in chunks])) == 10
    assert len([hit for hit in store.search(np.ones(4), 10) if hit.memory]) == 10
    assert store.delete(ids) == 10


# Deleting


def test_chunks_are_deleted_by_id(store: MemoryStore) -> None:
    add(store, *ALL)

    assert store.delete([ALPHA.id, "unknown"]) == 1
    assert store.delete([ALPHA.id]) == 0
    assert store.delete([]) == 0
    assert store.contains([chunk.id for chunk in ALL]) == {BETA.id, GAMMA.id, DELTA.id}
    assert ALPHA.id not in {hit.id for hit in store.search(np.ones(4), 10)}


def test_chunks_are_deleted_by_source(store: MemoryStore) -> None:
    add(store, *ALL)

    assert store.delete_source("a.md") == 2
    assert store.delete_source("a.md") == 0
    assert store.sources() == {"b.md": 1}


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        # Chunks without a source are not those of the source None.
        (lambda store: store.delete_source(None), "source must be a string, found None"),
        (lambda store: store.delete(DELTA.id), "ids must be a list, found"),
        (lambda store: store.get([ALPHA.id, None]), r"ids\[1\] must be of type str, found None"),
        (lambda store: store.memories([None]), r"keys\[0\] must be of type str, found None"),
        (lambda store: store.search(np.ones(4), "3"), "k must be a whole number, found '3'"),
    ],
)
def test_a_slip_deletes_and_finds_nothing(
    store: MemoryStore, slip: Callable[[MemoryStore], object], message: str
) -> None:
    add(store, *ALL)

    with pytest.raises(TypeError, match=message):
        slip(store)

    assert store.count() == len(ALL)


# What a store says of itself


def test_a_store_describes_itself(open_store: Open) -> None:
    store = open_store(codec="int8")
    add(store, *ALL)
    info = store.info()

    assert (info.chunks, info.fingerprint, info.embedder) == (4, MODEL, "minilm")
    assert (info.dimension, info.codec, info.location) == (4, "int8", store.location)


def test_the_codec_decides_how_memories_are_kept(open_store: Open) -> None:
    store = open_store(codec="int4")
    add(store, ALPHA)

    (hit,) = store.get([ALPHA.id])
    assert hit.memory is not None
    error = (hit.memory.values - make_memory(ALPHA).values.float()).abs().max()
    assert 0 < error < make_memory(ALPHA).values.abs().max() / 13


def test_damaged_memories_are_named_with_their_chunk(store: MemoryStore) -> None:
    add(store, ALPHA)
    damaged = bytearray(encode(make_memory(ALPHA)))
    damaged[-20] ^= 1

    for blob in (base64.b64encode(damaged).decode(), "not base64!", "é", 7):
        store.client.set_payload(store.collection, {MEMORY_FIELD: blob}, [point_id(ALPHA.id)])
        with pytest.raises(MemoryCodecError, match=f"chunk {ALPHA.id}, source 'a.md'"):
            store.search(np.ones(4), 1)
        assert store.search(np.ones(4), 1, with_memories=False)[0].text == "alpha"


def test_many_threads_share_a_store(store: MemoryStore) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(5):
                chunk = make_chunk(f"thread {number} text {i}", source=f"{number}.md")
                add(store, chunk)
                assert store.contains([chunk.id]) == {chunk.id}
                assert same(store.get([chunk.id])[0].memory, make_memory(chunk))
                store.search(np.ones(4), 3)
                list(store.scroll(batch_size=4, with_memories=False))
            if number % 2:
                store.delete_source(f"{number}.md")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert store.sources() == {"0.md": 5, "2.md": 5, "4.md": 5}


def test_a_closed_store_says_so(store: MemoryStore) -> None:
    store.close()
    store.close()

    with pytest.raises(StoreError, match="is closed"):
        store.count()


# Opening again


@pytest.fixture(params=["folder", "stub"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a store can be opened again."""
    if request.param == "folder":
        return str(tmp_path / "deep" / "store")
    return str(request.getfixturevalue("stub").url)


def test_everything_is_there_after_opening_again(place: str) -> None:
    with open_at(place, codec="fp16") as store:
        add(store, *ALL)
        store.delete([BETA.id])

    with MemoryStore.open(place) as store:
        assert (store.count(), store.record.codec, store.record.fingerprint) == (3, "fp16", MODEL)
        for hit in store.scroll():
            expected = make_memory(next(chunk for chunk in ALL if chunk.id == hit.id))
            assert hit.memory is not None
            assert torch.equal(hit.memory.values.float(), expected.values.float())


def test_search_scores_are_the_same_after_opening_again(tmp_path: Path) -> None:
    # The embedded Qdrant normalises embeddings when they are stored, but not when they are read.
    chunks = [make_chunk(f"text {i}") for i in range(50)]
    query = np.array([1.0, -2.0, 3.0, 0.5])
    with open_at(tmp_path) as store:
        store.upsert(chunks, make_embeddings(chunks) * 37, [make_memory(chunk) for chunk in chunks])
        before = store.search(query, 50)

    with open_at(tmp_path) as store:
        for after in (store.search(query, 50), store.search(query, 50)):
            assert [hit.id for hit in after] == [hit.id for hit in before]
            scores = [hit.score for hit in before]
            assert [hit.score for hit in after] == pytest.approx(scores, abs=1e-6)
        assert max(scores) <= 1.000001


def test_a_store_of_another_model_is_refused_with_the_fix(place: str) -> None:
    open_at(place).close()

    with pytest.raises(
        MemoryMismatchError, match=r"model f{32}, but the loaded model is a{32}\. L"
    ):
        open_at(place, fingerprint="a" * 32)
    open_at(place).close()  # a refused opening leaves no lock


def test_a_store_of_another_embedder_is_refused_with_the_fix(place: str) -> None:
    open_at(place).close()

    with pytest.raises(
        MemoryMismatchError, match=r"embedder minilm, but the loaded one is bge.*Use"
    ):
        open_at(place, embedder="bge")
    with pytest.raises(MemoryMismatchError, match="of 4 dimensions, but the embedder makes 8"):
        open_at(place, dimension=8)


def test_one_store_keeps_one_codec(place: str) -> None:
    open_at(place, codec="int8").close()

    with pytest.raises(StoreError, match="encoded as int8, but bf16 was asked for"):
        open_at(place, codec="bf16")
    with open_at(place) as store:
        assert store.record.codec == "int8"


def test_collections_of_one_place_are_apart(place: str) -> None:
    with open_at(place) as store:
        add(store, ALPHA)
    with open_at(place, collection="other", fingerprint="a" * 32) as store:
        assert store.count() == 0


def test_opening_what_does_not_exist_needs_to_know_how_to_create_it(tmp_path: Path) -> None:
    for location in (tmp_path / "none", ":memory:"):
        with pytest.raises(StoreError, match=r"does not exist\. Index documents into it first"):
            MemoryStore.open(location)
    assert list(tmp_path.iterdir()) == []


def test_a_collection_of_another_program_is_refused(stub: QdrantStub) -> None:
    vectors = models.VectorParams(size=4, distance=models.Distance.COSINE)
    stub.client.create_collection("softrag", vectors)
    with pytest.raises(StoreError, match="softrag did not create it"):
        open_at(stub.url)

    stub.client.update_collection("softrag", metadata={"softrag": {"format": 2}})
    with pytest.raises(StoreError, match="is of format 2; this softrag reads format 1"):
        open_at(stub.url)

    stub.client.update_collection("softrag", metadata={"softrag": {"format": 1}})
    with pytest.raises(StoreError, match="incomplete softrag record"):
        open_at(stub.url)


def test_an_unknown_codec_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown codec 'zip'"):
        open_at(tmp_path / "store", codec="zip")
    assert list(tmp_path.iterdir()) == []


# Folders


def test_a_folder_open_elsewhere_is_refused(tmp_path: Path) -> None:
    with open_at(tmp_path) as store:
        add(store, ALPHA)
        with pytest.raises(StoreError, match="is open elsewhere: in another process"):
            open_at(tmp_path)
        assert store.count() == 1


def test_a_folder_that_cannot_be_a_store_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(StoreError, match=r"Opening failed in .*file"):
        open_at(file)

    with pytest.raises(ValueError, match="neither a folder nor the URL of a Qdrant server"):
        open_at("ftp://localhost:6333")

    damaged = tmp_path / "damaged"
    open_at(damaged).close()
    for manifest in ('{"collections":', "[]", '{"collections": {"softrag": {}}, "aliases": {}}'):
        (damaged / "meta.json").write_text(manifest)
        with pytest.raises(StoreError, match=r"is damaged \(.*Restore the folder from a backup"):
            open_at(damaged)


def test_a_server_without_its_scheme_is_not_taken_for_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ValueError, match="Write http://localhost:6333 for a server"):
        open_at("localhost:6333")
    assert list(tmp_path.iterdir()) == []


def test_a_first_opening_that_was_interrupted_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "meta.json").touch()

    with open_at(tmp_path) as store:
        assert store.count() == 0


def test_the_size_on_disk_is_known(tmp_path: Path) -> None:
    with open_at(tmp_path) as store:
        add(store, *ALL)
        size = store.info().bytes_on_disk

    database = (tmp_path / "collection" / "softrag" / "storage.sqlite").stat().st_size
    assert database <= size <= database + 2**16  # and an index of the log while it is open


def test_a_memory_takes_at_most_1_4_times_its_values(tmp_path: Path) -> None:
    memory = replace(make_memory(ALPHA), values=torch.randn(8, 576).bfloat16())
    with open_at(tmp_path) as store:
        store.upsert([ALPHA], make_embeddings([ALPHA]), [memory])
        (record,) = store.client.retrieve(store.collection, [point_id(ALPHA.id)])

    assert len(record.payload[MEMORY_FIELD]) <= 1.4 * memory.nbytes


def test_what_upsert_acknowledged_is_synced_to_the_disk(tmp_path: Path) -> None:
    # Guards the one place that reaches into the client: without it every point is synced alone,
    # about twenty times slower.
    with open_at(tmp_path) as store:
        add(store, *ALL)
        folder = tmp_path / "collection" / "softrag"

        assert (folder / "storage.sqlite-wal").stat().st_size == 0
        with contextlib.closing(sqlite3.connect(folder / "storage.sqlite")) as reader:
            assert reader.execute("SELECT count(*) FROM points").fetchone() == (4,)


def test_a_store_written_by_an_unsynced_client_still_opens(tmp_path: Path) -> None:
    with open_at(tmp_path) as store:
        add(store, ALPHA)

    with contextlib.closing(QdrantClient(path=str(tmp_path))) as client:
        (record,) = client.retrieve("softrag", [point_id(ALPHA.id)])
        assert record.payload["text"] == "alpha"


def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path) -> None:
    chunks = [make_chunk(f"text {i}" * 100) for i in range(200)]
    with open_at(tmp_path) as store:
        add(store, *chunks[:20])
        # The database may grow by a few pages more: the same error as a full disk gives.
        (pages,) = store.points._database.execute("PRAGMA page_count").fetchone()
        store.points._database.execute(f"PRAGMA max_page_count = {pages + 10}")

        with pytest.raises(StoreError, match=r"the disk of .* is full .* Free some space"):
            add(store, *chunks[20:])
        check_intact(store, chunks[:20])

    with open_at(tmp_path) as store:
        check_intact(store, chunks[:20])
        add(store, *chunks)
        check_intact(store, chunks)


def test_a_really_full_disk_is_named_and_loses_nothing(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)]
    try:
        is_mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        is_mounted = False
    if not is_mounted:
        pytest.skip("a small disk cannot be mounted here")
    try:
        chunks = [make_chunk(f"text {i}" * 100) for i in range(400)]
        acknowledged: list[Chunk] = []

        def add_all(store: MemoryStore) -> None:
            for start in range(0, 400, 10):
                add(store, *chunks[start : start + 10])
                acknowledged.extend(chunks[start : start + 10])

        with open_at(tmp_path) as store:
            with pytest.raises(StoreError, match=r"the disk of .* is full"):
                add_all(store)
            check_intact(store, acknowledged)
        assert acknowledged

        with open_at(tmp_path) as store:
            check_intact(store, acknowledged)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def check_intact(store: MemoryStore, chunks: list[Chunk]) -> None:
    hits = store.get([chunk.id for chunk in chunks])
    assert [hit.text for hit in hits] == [chunk.text for chunk in chunks]
    assert all(
        same(hit.memory, make_memory(chunk)) for hit, chunk in zip(hits, chunks, strict=True)
    )


KILLED = """
import sys
from pathlib import Path
from tests.core.stored_chunks import add, make_chunk, open_at

with open_at(sys.argv[1]) as store:
    for start in range(0, 100_000, 8):
        add(store, *(make_chunk(f"text {i}") for i in range(start, start + 8)))
        sys.stdout.write(f"{start + 8}\\n")
        sys.stdout.flush()
"""


def test_a_killed_process_loses_nothing_it_acknowledged(tmp_path: Path) -> None:
    folders = [tmp_path / str(i) for i in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for folder in folders
    ]
    for process, folder, batches in zip(processes, folders, (5, 25), strict=True):
        with process:
            for _ in range(batches):
                assert process.stdout.readline()
            # Anywhere within the writing of the next batches.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=random.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            acknowledged = 8 * (batches + process.stdout.read().count("\n"))
        assert process.returncode == -signal.SIGKILL

        with open_at(folder) as store:
            check_intact(store, [make_chunk(f"text {j}") for j in range(acknowledged)])
            everything = [make_chunk(f"text {j}") for j in range(store.count() + 20)]
            present = store.contains([chunk.id for chunk in everything])
            assert len(present) == store.count()
            check_intact(store, [chunk for chunk in everything if chunk.id in present])

            add(store, *(chunk for chunk in everything if chunk.id not in present))
            check_intact(store, everything)
            assert store.count() == len(everything)


def test_a_large_embedded_store_is_logged_once_and_warns_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from qdrant_client.common import client_warnings
    from qdrant_client.local.local_collection import LocalCollection
    from qdrant_client.local.qdrant_local import QdrantLocal

    monkeypatch.setattr(client_warnings, "SEEN_MESSAGES", set())
    for size in (LocalCollection, QdrantLocal):
        monkeypatch.setattr(size, "LARGE_DATA_THRESHOLD", 2)
    monkeypatch.setattr(store_module, "LARGE_EMBEDDED_STORE", 2)

    with caplog.at_level(logging.WARNING), open_at(tmp_path) as store:
        add(store, ALPHA, BETA)
        assert caplog.messages == []
        add(store, GAMMA)
        add(store, DELTA)
    open_at(tmp_path).close()

    assert len(caplog.messages) == 2  # once for each store opened
    assert "holds 3 chunks" in caplog.messages[0]
    assert "run a Qdrant server" in caplog.messages[0]


# Servers


def test_a_server_is_sent_one_point_per_chunk(stub: QdrantStub) -> None:
    with open_at(stub.url) as store:
        add(store, ALPHA)

    (created,) = stub.sent("PUT", "/collections/softrag")
    assert created.body["vectors"] == {"size": 4, "distance": "Cosine"}
    assert created.body["metadata"] == {
        "softrag": {
            "fingerprint": MODEL,
            "embedder": "minilm",
            "dimension": 4,
            "codec": "bf16",
            "format": 1,
        }
    }
    indexed = [each.body["field_name"] for each in stub.sent("PUT", "/collections/softrag/index")]
    assert indexed == ["source", KEY_FIELD]
    (stored,) = stub.sent("PUT", "/collections/softrag/points")
    (point,) = stored.body["points"]
    assert point["id"] == point_id(ALPHA.id)
    (vector,) = make_embeddings([ALPHA])
    assert point["vector"] == pytest.approx((vector / np.linalg.norm(vector)).tolist())
    assert point["payload"] == {
        "text": "alpha",
        "source": "a.md",
        "title": "On alpha",
        "metadata": dict(ALPHA.metadata),
        "chunk_id": ALPHA.id,
        "n_tokens": 5,
        "start": 7,
        "softrag_key": make_memory(ALPHA).key,
        "softrag_memory": base64.b64encode(encode(make_memory(ALPHA))).decode(),
    }


def test_a_server_sends_memories_of_the_final_k_alone(stub: QdrantStub) -> None:
    with open_at(stub.url) as store:
        add(store, *ALL)
        hits = store.search(make_embeddings([ALPHA])[0], 2, where={"lang": ["en", "fr"]})

    (query,) = stub.sent("POST", "/collections/softrag/points/query")
    assert query.body["limit"] == 2
    assert query.body["with_payload"] == {"exclude": ["softrag_memory"]}
    assert query.body["filter"] == {
        "must": [{"key": 'metadata."lang"', "match": {"any": ["en", "fr"]}}]
    }
    (fetch,) = stub.sent("POST", "/collections/softrag/points")
    assert fetch.body["ids"] == [point_id(hit.id) for hit in hits]
    assert fetch.body["with_payload"] == ["softrag_memory"]
    assert all(hit.memory is not None for hit in hits)


def test_a_server_sends_a_hot_memory_once(stub: QdrantStub) -> None:
    with open_at(stub.url) as store:
        add(store, *ALL)
        query = make_embeddings([ALPHA])[0]
        (first,) = store.search(query, 1)
        two = store.search(query, 2)
        again = store.search(query, 2)

        assert again[0].memory is two[0].memory
        assert torch.equal(again[0].memory.values, first.memory.values)
    fetched = [len(each.body["ids"]) for each in stub.sent("POST", "/collections/softrag/points")]
    assert fetched == [1, 1]


def test_requests_to_a_server_stay_below_its_limit(
    stub: QdrantStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert points_module.MAX_REQUEST_BYTES < 32 * 2**20 / 1.9
    monkeypatch.setattr(points_module, "MAX_REQUEST_BYTES", 50_000)
    chunks = [make_chunk(f"{i} " + "漢字\n" * 1000) for i in range(20)]

    with open_at(stub.url) as store:
        add(store, *chunks)
        assert store.count() == 20

    sizes = [each.nbytes for each in stub.sent("PUT", "/collections/softrag/points")]
    assert len(sizes) > 1
    assert max(sizes) <= 50_000


def test_the_api_key_is_sent(stub: QdrantStub) -> None:
    with pytest.warns(UserWarning, match="insecure connection"):
        open_at(stub.url, api_key="secret").close()

    assert {each.headers["api-key"] for each in stub.requests} == {"secret"}


def test_two_processes_may_create_a_collection_at_once(stub: QdrantStub) -> None:
    # Both are told that there is none; one then comes too late.
    late = threading.Barrier(2)
    exists, calls = stub.client.collection_exists, []

    def nobody_has_it_yet(name: str) -> bool:
        calls.append(name)
        return len(calls) > 2 and exists(name)

    stub.client.collection_exists = nobody_has_it_yet
    opened: list[object] = []

    def open_one() -> None:
        try:
            late.wait()
            open_at(stub.url).close()
            opened.append(True)
        except BaseException as error:
            opened.append(error)

    threads = [threading.Thread(target=open_one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert opened == [True, True]
    assert len(stub.sent("PUT", "/collections/softrag")) == 2


@pytest.mark.parametrize("status", [401, 500, 507])
def test_an_error_of_the_server_is_a_store_error(stub: QdrantStub, status: int) -> None:
    with open_at(stub.url) as store:
        stub.failures["/points"] = status
        with pytest.raises(StoreError, match=rf"Storing chunks failed .*{status}[\s\S]*API key"):
            add(store, ALPHA)


def test_an_unreachable_server_is_named(stub: QdrantStub, grpc_stub: QdrantGrpcStub) -> None:
    stub.close()
    grpc_stub.close()

    with pytest.raises(StoreError, match=rf"Opening failed on the Qdrant server {stub.url}"):
        open_at(stub.url)
    with pytest.raises(StoreError, match=r"Opening failed on the Qdrant server .*connect"):
        open_at(grpc_stub.url, prefer_grpc=True, grpc_port=grpc_stub.port)
