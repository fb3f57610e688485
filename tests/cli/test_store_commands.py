"""`softrag store`, and `softrag index` with several workers: what the commands promise."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import softrag.bulk
from softrag.bulk import WorkerSetup
from tests.bulk_workers import MortalEmbedder
from tests.checkpoints import build_checkpoint
from tests.cli.command import run
from tests.core.qdrant_stub import QdrantStub

COMMAND = Path(__file__).parent.parent / "bulk_command.py"


# index with workers


def test_index_with_workers_reports_what_a_million_chunks_cost(tmp_path, folder, monkeypatch):
    small = partial(WorkerSetup, embedder=MortalEmbedder)
    monkeypatch.setattr(softrag.bulk, "WorkerSetup", small)
    options = ["--workers", 2, "--price-per-hour", 3]

    result = run("index", folder, *options, "--json", store=tmp_path / "store")
    again = run("index", folder, *options, store=tmp_path / "store")

    report = json.loads(result.stdout)
    assert (report["documents"], report["chunks_added"], report["workers"]) == (8, 8, 2)
    speed, cost = report["chunks_per_second"], report["cost_per_million_chunks"]
    assert cost == pytest.approx(3 * 1e6 / speed / 3600)
    assert "0 chunks added, 8 unchanged, 0 deleted" in again.stdout
    assert "2 workers" in again.stdout
    asked = run("ask", "Who wrote Hamlet?", "-k", 99, "--json", store=tmp_path / "store")
    assert len(json.loads(asked.stdout)["sources"]) == 8


@pytest.mark.parametrize("late_rank", ["none", "1"])
def test_index_under_torchrun_has_one_report_and_one_store(tmp_path, folder, late_rank):
    done = index_under_torchrun(tmp_path / "store", build_checkpoint(), folder, late_rank)

    assert done.returncode == 0, done.stderr
    (report,) = map(json.loads, done.stdout.splitlines())
    assert (report["workers"], report["chunks_added"], report["errors"]) == (2, 8, [])
    info = run("store", "info", tmp_path / "store", "--json", store=tmp_path / "store")
    assert json.loads(info.stdout)["chunks"] == 8


def test_index_under_torchrun_says_in_its_own_words_what_went_wrong(tmp_path, folder):
    lonely = Path(shutil.copytree(build_checkpoint(), tmp_path / "lonely"))
    config = json.loads((lonely / "config.json").read_text())
    (lonely / "config.json").write_text(json.dumps(config | {"compressor": "/nowhere"}))

    done = index_under_torchrun(tmp_path / "store", lonely, folder, late_rank="1")

    assert done.returncode != 0
    assert "names the base model '/nowhere', which is neither a folder" in done.stderr


def index_under_torchrun(
    store: Path,
    checkpoint: Path,
    folder: Path,
    late_rank: str,
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LATE_RANK": late_rank,
        "SOFTRAG_STORE": str(store),
        "SOFTRAG_MODEL": str(checkpoint),
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launcher, COMMAND, "index", folder, "--json"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_index_prunes_files_that_no_longer_exist_on_request(folder, store):
    (folder / "note_0.txt").unlink()

    kept = json.loads(run("index", folder, "--json", store=store).stdout)
    pruned = run("index", folder, "--prune", store=store)

    assert (kept["sources_pruned"], kept["chunks_unchanged"]) == (0, 7)
    assert "1 files that no longer exist deleted" in pruned.stdout
    info = json.loads(run("store", "info", store, "--json", store=store).stdout)
    assert info["chunks"] == 7


# store


def test_a_store_moves_to_a_server_in_another_codec_and_is_asked_there(store, tmp_path):
    stub = QdrantStub()
    try:
        moving = ["store", "migrate", store, stub.url, "--json"]
        first = run(*moving, "--codec", "int8", store=store)
        again = run(*moving, store=store)
        info = run("store", "info", stub.url, "--json", store=store)
        asked = run("ask", "Who wrote Hamlet?", "--json", store=stub.url)
    finally:
        stub.close()

    assert json.loads(first.stdout) == {"chunks_copied": 8, "chunks_unchanged": 0}
    assert json.loads(again.stdout) == {"chunks_copied": 0, "chunks_unchanged": 8}
    values = json.loads(info.stdout)
    assert (values["chunks"], values["codec"], values["bytes_on_disk"]) == (8, "int8", None)
    assert json.loads(asked.stdout)["mode"] == "memory"


def test_a_store_is_saved_and_restored(store, tmp_path):
    saved = run("store", "snapshot", store, tmp_path / "kept.tar", store=store)
    restored = run("store", "restore", tmp_path / "kept.tar", tmp_path / "b", "--json", store=store)
    twice = run("store", "restore", tmp_path / "kept.tar", tmp_path / "b", store=store)

    assert "saved to" in saved.stdout
    assert json.loads(restored.stdout)["chunks"] == 8
    assert twice.exit_code == 1
    assert "not empty" in twice.stderr


def test_a_store_is_created_with_a_layout_and_then_filled(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("softrag.embedder.default_embedder", lambda: MortalEmbedder("cpu"))
    stub = QdrantStub()
    layout = ["--shards", 3, "--replicas", 2, "--quantization", "int8"]
    try:
        made = run("store", "create", stub.url, *layout, "--codec", "fp8", "--json", store=stub.url)
        indexed = run("index", folder, "--json", store=stub.url)
    finally:
        stub.close()

    assert json.loads(made.stdout)["codec"] == "fp8"
    assert json.loads(indexed.stdout)["chunks_added"] == 8
    (created,) = stub.sent("PUT", "/collections/softrag")
    assert (created.body["shard_number"], created.body["replication_factor"]) == (3, 2)


def test_a_layout_that_cannot_be_is_an_error_without_a_traceback(tmp_path, store):
    result = run("store", "create", tmp_path / "b", "--write-consistency", 3, store=store)

    assert result.exit_code == 1
    assert "between 1 and the 1 replicas" in result.stderr
