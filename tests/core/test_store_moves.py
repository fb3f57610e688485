"""A store moved as a whole: into another store, another codec, a file and back."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

from softrag.errors import MemoryMismatchError, StoreError
from softrag.store import CollectionLayout, MemoryStore, migrate, restore, snapshot
from tests.core.qdrant_grpc_stub import QdrantGrpcStub
from tests.core.qdrant_stub import QdrantStub
from tests.core.stored_chunks import (
    ALL,
    ALPHA,
    add,
    make_chunk,
    make_embeddings,
    make_memory,
    open_at,
    same,
)

# Of 127.0.0.1, signed by itself, with its key; for tests alone.
CERTIFICATE = Path(__file__).parent / "tls" / "loopback.pem"


def assert_holds(store: MemoryStore, *chunks: object) -> None:
    assert store.count() == len(chunks)
    for chunk, hit in zip(chunks, store.get([chunk.id for chunk in chunks]), strict=True):
        assert (hit.text, hit.source, hit.title) == (chunk.text, chunk.source, chunk.title)
        assert dict(hit.metadata) == dict(chunk.metadata)
        assert same(hit.memory, make_memory(chunk))
    nearest = store.search(make_embeddings([ALPHA])[0], 1, with_memories=False)
    assert (nearest[0].id, nearest[0].score) == (ALPHA.id, pytest.approx(1))


# Into another store


@pytest.mark.parametrize("way", ["http", "grpc"])
def test_a_folder_moves_to_a_server_bit_for_bit(tmp_path, stub, grpc_stub, way):
    grpc = {"prefer_grpc": True, "grpc_port": grpc_stub.port}
    options = {"http": {}, "grpc": grpc}[way]
    url = {"http": stub.url, "grpc": grpc_stub.url}[way]
    with open_at(tmp_path) as source, open_at(url, **options) as target:
        add(source, *ALL)

        report = migrate(source, target)

        assert (report.chunks_copied, report.chunks_unchanged) == (4, 0)
        assert_holds(target, *ALL)


def test_a_server_moves_to_a_folder(tmp_path, stub):
    with open_at(stub.url) as source, open_at(tmp_path) as target:
        add(source, *ALL)

        migrate(source, target)

        assert_holds(target, *ALL)


def test_a_move_that_was_stopped_goes_on_and_sends_only_what_is_missing(
    tmp_path, stub, monkeypatch
):
    monkeypatch.setattr("softrag.store.migration.PAGE", 10)
    chunks = [ALPHA, *(make_chunk(f"text {number}") for number in range(34))]
    with open_at(tmp_path) as source, open_at(stub.url) as target:
        add(source, *chunks)

        def stop(done: int) -> None:
            if done == 20:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            migrate(source, target, on_progress=stop)
        add(source, make_chunk("text 0", source="a.md", changed=True))
        report = migrate(source, target)
        again = migrate(source, target)

        # One of the 20 was changed meanwhile, unless it was not among them.
        assert (report.chunks_copied, report.chunks_unchanged) in [(16, 19), (15, 20)]
        assert (again.chunks_copied, again.chunks_unchanged) == (0, 35)
        assert target.count() == 35


def test_a_move_changes_the_codec_as_compressing_into_it_would(tmp_path):
    with (
        open_at(tmp_path / "a") as source,
        open_at(tmp_path / "b", codec="int8") as target,
        open_at(tmp_path / "c", codec="int8") as direct,
    ):
        add(source, *ALL)
        add(direct, *ALL)

        migrate(source, target)

        for moved, made in zip(target.get([ALPHA.id]), direct.get([ALPHA.id]), strict=True):
            assert moved.memory.values.dtype == torch.float32
            assert torch.equal(moved.memory.values, made.memory.values)
            assert moved.memory.key == make_memory(ALPHA).key


def test_chunks_without_memories_move_too(tmp_path):
    with open_at(tmp_path / "a") as source, open_at(tmp_path / "b", codec="fp16") as target:
        source.upsert([ALPHA], make_embeddings([ALPHA]), [None])

        migrate(source, target)

        (hit,) = target.get([ALPHA.id])
        assert (hit.text, hit.memory) == ("alpha", None)


def test_stores_of_different_models_do_not_mix(tmp_path):
    with open_at(tmp_path / "a") as source, open_at(tmp_path / "b", fingerprint="e" * 32) as target:
        add(source, *ALL)

        with pytest.raises(MemoryMismatchError, match=r"fingerprint ffff.* of eeee"):
            migrate(source, target)
        assert target.count() == 0


# Into a file


def test_a_folder_becomes_a_file_and_a_folder_again(tmp_path):
    with open_at(tmp_path / "a") as store:
        add(store, *ALL)
        size = snapshot(store, tmp_path / "kept.tar")
        add(store, make_chunk("later"))

    restore(tmp_path / "kept.tar", tmp_path / "b")

    assert size == (tmp_path / "kept.tar").stat().st_size > 0
    assert not (tmp_path / "kept.tar.part").exists()
    with MemoryStore.open(tmp_path / "b") as restored:
        assert_holds(restored, *ALL)
        add(restored, make_chunk("and it can be written"))


def test_a_server_becomes_a_file_and_a_server_again(tmp_path, stub):
    with open_at(stub.url) as store:
        add(store, *ALL)
        snapshot(store, tmp_path / "kept.snapshot")
        store.delete([ALPHA.id])
    assert stub.snapshots == {}, "the server keeps no second copy"

    restore(tmp_path / "kept.snapshot", stub.url)
    restore(tmp_path / "kept.snapshot", stub.url, collection="copy")

    for collection in ("softrag", "copy"):
        with MemoryStore.open(stub.url, collection=collection) as restored:
            assert_holds(restored, *ALL)


def test_a_server_that_is_not_there_is_named(tmp_path, stub):
    (tmp_path / "kept.snapshot").write_bytes(b"{}")
    stub.close()

    with pytest.raises(StoreError, match=rf"{stub.url} did not do it: .*refused"):
        restore(tmp_path / "kept.snapshot", stub.url)


def test_a_snapshot_is_never_restored_over_something(tmp_path):
    with open_at(tmp_path / "a") as store:
        add(store, *ALL)
        snapshot(store, tmp_path / "kept.tar")

    with pytest.raises(StoreError, match="not empty"):
        restore(tmp_path / "kept.tar", tmp_path / "a")


def test_what_is_no_snapshot_is_refused(tmp_path):
    (tmp_path / "text").write_text("no archive")
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.add(tmp_path / "text", arcname="text")

    with pytest.raises(StoreError, match="cannot be read"):
        restore(tmp_path / "text", tmp_path / "b")
    with pytest.raises(StoreError, match=r"no meta\.json"):
        restore(tmp_path / "other.tar", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_snapshot_into_a_folder_that_is_not_there_names_the_folder(tmp_path):
    with open_at(tmp_path / "a") as store, pytest.raises(StoreError, match="nowhere is no folder"):
        snapshot(store, tmp_path / "nowhere" / "file")


def test_a_snapshot_onto_a_folder_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()

    with open_at(tmp_path / "a") as store, pytest.raises(StoreError, match="it is a folder"):
        snapshot(store, tmp_path / "folder")

    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "folder"]


def test_a_snapshot_cannot_write_outside_its_folder(tmp_path):
    (tmp_path / "meta.json").write_text("{}")
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        archive.add(tmp_path / "meta.json", arcname="meta.json")
        archive.add(tmp_path / "meta.json", arcname="../escaped.json")

    with pytest.raises(StoreError, match="cannot be read"):
        restore(tmp_path / "evil.tar", tmp_path / "deep" / "b")
    assert not (tmp_path / "deep" / "escaped.json").exists()


def test_a_store_in_memory_has_nothing_to_keep(tmp_path):
    with open_at(":memory:") as store, pytest.raises(StoreError, match="Migrate it"):
        snapshot(store, tmp_path / "kept.tar")


# How a server lays a collection out


def test_a_layout_is_sent_to_the_server(stub):
    layout = CollectionLayout(
        shards=6, replicas=2, write_consistency=2, quantization="int8", vectors_on_disk=True
    )

    open_at(stub.url, layout=layout).close()

    (created,) = stub.sent("PUT", "/collections/softrag")
    body = {k: v for k, v in created.body.items() if v is not None and k != "metadata"}
    assert body == {
        "vectors": {"size": 4, "distance": "Cosine", "on_disk": True},
        "shard_number": 6,
        "replication_factor": 2,
        "write_consistency_factor": 2,
        "on_disk_payload": True,
        "quantization_config": {"scalar": {"type": "int8", "quantile": 0.99, "always_ram": True}},
    }


def test_a_layout_is_sent_over_grpc_too(grpc_stub):
    layout = CollectionLayout(shards=3, replicas=2, quantization="binary")

    open_at(grpc_stub.url, prefer_grpc=True, grpc_port=grpc_stub.port, layout=layout).close()

    (created,) = grpc_stub.created
    assert (created.shard_number, created.replication_factor) == (3, 2)
    assert created.quantization_config.binary.always_ram
    assert created.on_disk_payload


@pytest.mark.parametrize(
    "wrong", [{"shards": 0}, {"replicas": 0}, {"write_consistency": 2}, {"quantization": "int3"}]
)
def test_a_layout_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        CollectionLayout(**wrong)


def test_the_api_key_may_stand_in_the_environment(stub, monkeypatch):
    monkeypatch.setenv("QDRANT_API_KEY", "secret")

    with pytest.warns(UserWarning, match="insecure connection"):
        open_at(stub.url).close()

    assert {each.headers["api-key"] for each in stub.requests} == {"secret"}


# TLS


def test_an_https_url_is_spoken_to_in_tls_with_the_key(monkeypatch):
    secure = QdrantStub(CERTIFICATE)
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    try:
        with open_at(secure.url, api_key="secret") as store:
            add(store, *ALL)
            assert_holds(store, *ALL)
    finally:
        secure.close()

    assert {each.headers["api-key"] for each in secure.requests} == {"secret"}


def test_an_https_url_is_spoken_to_in_tls_over_grpc(monkeypatch):
    secure = QdrantGrpcStub(CERTIFICATE)
    monkeypatch.setenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", str(CERTIFICATE))
    try:
        with open_at(secure.url, prefer_grpc=True, grpc_port=secure.port) as store:
            add(store, *ALL)
            assert_holds(store, *ALL)
    finally:
        secure.close()


def test_a_server_with_an_unknown_certificate_is_not_trusted():
    secure = QdrantStub(CERTIFICATE)
    try:
        with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
            open_at(secure.url, api_key="secret")
    finally:
        secure.close()

    assert secure.requests == []
