"""Bulk indexing: whoever dies, the store ends with exactly what one process would have made."""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from softrag import SoftRAG
from softrag.bulk import StoreAddress, WorkerSetup, index_files
from softrag.bulk.shares import cut_shares
from softrag.errors import CheckpointError, MemoryMismatchError, SoftRAGError, StoreError
from softrag.files import find_files, read_file, read_files
from softrag.store import MemoryStore
from tests.bulk_workers import MortalEmbedder, ThreadCountingEmbedder, UnreachableEmbedder
from tests.checkpoints import build_checkpoint, build_model
from tests.core.qdrant_stub import QdrantStub
from tests.embedders import HashingEmbedder
from tests.families import SENTENCES

ROOT = Path(__file__).parent.parent.parent


def write_corpus(folder: Path, *, files: int = 40, lines: int = 60) -> Path:
    """Write text files and one JSON lines file, every text of its own and two of them twice."""
    folder.mkdir()
    for number in range(files):
        text = "\n\n".join(f"{number}. {sentence}" for sentence in SENTENCES[: 1 + number % 3])
        (folder / f"note_{number:02}.txt").write_text(text)
    records = [
        {"text": f"Line {number}: {SENTENCES[number % 8]}", "source": f"list {number % 5}"}
        for number in [*range(lines), 0, 1]
    ]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus")


def setup(store: Path | str, **changes: object) -> WorkerSetup:
    options = {
        "checkpoint": str(build_checkpoint()),
        "store": StoreAddress(location=str(store)),
        "threads": 1,
        "embedder": MortalEmbedder,
        "batch_size": 8,
    }
    return WorkerSetup(**options | changes)


def contents(store: Path | str) -> dict[str, tuple[object, ...]]:
    """Everything a store holds, by chunk; fails where a chunk is there twice."""
    with MemoryStore.open(store) as opened:
        hits = list(opened.scroll())
    assert len({hit.id for hit in hits}) == len(hits)
    return {
        hit.id: (hit.text, hit.source, hit.title, hit.memory.key, hit.memory.values) for hit in hits
    }


def by_one_process(corpus: Path, store: Path) -> dict[str, tuple[object, ...]]:
    with SoftRAG.from_pretrained(
        build_checkpoint(), store=store, embedder=HashingEmbedder(), load_decoder=False
    ) as engine:
        engine.add(document for result in read_files([corpus]) for document in result.documents)
    return contents(store)


def assert_same(found: dict[str, tuple[object, ...]], expected: dict[str, tuple[object, ...]]):
    assert set(found) == set(expected)
    for id_, (*said, values) in found.items():
        assert said == list(expected[id_][:-1])
        # Batches differ, and with them the last bits of a sum.
        torch.testing.assert_close(values, expected[id_][-1], rtol=0.02, atol=0.02)


# Shares


def test_shares_hold_every_document_once_and_in_place(corpus):
    whole = [d for result in read_files([corpus]) for d in result.documents]

    shares = list(cut_shares(find_files([corpus]), share_bytes=500))
    parts = [d for share in shares for piece in share.pieces for d in piece.read().documents]

    assert parts == whole
    assert len(shares) > 10
    assert [share.number for share in shares] == list(range(len(shares)))
    assert sum(share.nbytes for share in shares) == sum(f.stat().st_size for f in corpus.iterdir())


def test_a_bad_line_is_named_by_its_number_in_the_whole_file(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"text": "fine"}\n' * 30 + "broken\n" + '{"text": "fine"}\n' * 30)
    with pytest.raises(Exception, match="line 31: not JSON") as whole:
        read_file(file)

    results = [p.read() for s in cut_shares([file], share_bytes=100) for p in s.pieces]

    errors = [str(result.error) for result in results if result.error]
    assert errors == [str(whole.value)]
    assert sum(len(result.documents) for result in results) > 50


# Workers


@pytest.mark.parametrize(("workers", "threads"), [(1, 4), (3, 1), (8, 1)])
def test_workers_divide_the_cores_among_them(corpus, tmp_path, workers, threads, monkeypatch):
    (notes := tmp_path / "notes").mkdir()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    embedder = partial(ThreadCountingEmbedder, notes=notes)

    index_files(
        [corpus],
        setup=setup(tmp_path / "store", threads=None, embedder=embedder),
        workers=workers,
    )

    assert {note.read_text() for note in notes.iterdir()} == {f"{threads} {threads}"}


def test_workers_make_what_one_process_makes(corpus, tmp_path):
    expected = by_one_process(corpus, tmp_path / "one")
    seen = []

    report = index_files(
        [corpus],
        setup=setup(tmp_path / "many"),
        workers=2,
        on_progress=lambda now, total: seen.append((now.nbytes, total)),
    )

    assert_same(contents(tmp_path / "many"), expected)
    assert report.documents == 102
    # Two texts are there twice; workers that come to them at the same time both compress them.
    assert report.chunks_added >= len(expected)
    assert report.chunks_added + report.chunks_unchanged == len(expected) + 2
    assert (report.chunks_deleted, report.errors) == (0, [])
    assert (report.workers, report.restarts) == (2, 0)
    size = sum(file.stat().st_size for file in corpus.iterdir())
    assert max(seen) == (size, size)


def test_a_second_run_compresses_nothing_and_drops_what_is_gone(corpus, tmp_path):
    index_files([corpus], setup=setup(tmp_path / "store"), workers=1)
    before = len(contents(tmp_path / "store"))
    (corpus / "note_00.txt").write_text("Another text.")
    lines = (corpus / "lines.jsonl").read_text().splitlines()
    (corpus / "lines.jsonl").write_text("\n".join(lines[10:]) + "\n")

    report = index_files([corpus], setup=setup(tmp_path / "store"), workers=2)

    # Lines 0 and 1 are there a second time, at the end.
    assert (report.chunks_added, report.chunks_deleted) == (1, 1 + 8)
    assert len(contents(tmp_path / "store")) == before + 1 - 9


@pytest.mark.parametrize("place", ["folder", "server"])
def test_four_workers_of_which_two_are_killed_lose_and_double_nothing(corpus, tmp_path, place):
    expected = by_one_process(corpus, tmp_path / "one")
    stub = QdrantStub() if place == "server" else None
    store = stub.url if stub else tmp_path / "many"
    kills = tmp_path / "kills"
    kills.mkdir()
    for batch in (1, 3):  # the memories of these batches are made, and not yet stored
        (kills / str(batch)).touch()
    mortal = setup(store, batch_size=4, embedder=partial(MortalEmbedder, kills=kills))

    try:
        report = index_files([corpus], setup=mortal, workers=4)
        found = contents(store)
    finally:
        if stub:
            stub.close()

    assert list(kills.iterdir()) == []
    assert report.restarts <= 2  # the living may be done before the dead are missed
    assert_same(found, expected)


def test_the_only_worker_is_replaced_when_it_dies(corpus, tmp_path):
    expected = by_one_process(corpus, tmp_path / "one")
    kills = tmp_path / "kills"
    kills.mkdir()
    (kills / "1").touch()
    mortal = setup(tmp_path / "many", embedder=partial(MortalEmbedder, kills=kills))

    report = index_files([corpus], setup=mortal, workers=1)

    assert report.restarts == 1
    assert_same(contents(tmp_path / "many"), expected)


def test_workers_killed_at_random_times_lose_and_double_nothing(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", files=120, lines=400)
    expected = by_one_process(corpus, tmp_path / "one")
    dice = random.Random(7)
    # How far the run is when one of them dies; what its victim is at is up to chance.
    deaths = [dice.uniform(0.4, 0.8), dice.uniform(0.0, 0.4)]
    lock = threading.Lock()
    killed = []

    def kill(now, total):
        with lock:
            if deaths and now.nbytes >= deaths[-1] * total:
                deaths.pop()
                victim = dice.choice([each for each in active_children() if each.pid not in killed])
                os.kill(victim.pid, signal.SIGKILL)
                killed.append(victim.pid)

    report = index_files(
        [corpus], setup=setup(tmp_path / "many", batch_size=4), workers=4, on_progress=kill
    )

    assert len(killed) == 2
    assert report.errors == []
    assert_same(contents(tmp_path / "many"), expected)


def test_the_whole_run_killed_and_run_again_loses_and_doubles_nothing(corpus, tmp_path):
    expected = by_one_process(corpus, tmp_path / "one")
    program = (
        "from pathlib import Path\n"
        "from tests.core.test_bulk import index_files, setup, os, signal\n"
        "def stop(now, total):\n"
        "    if now.nbytes > total / 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if __name__ == '__main__':\n"
        f"    index_files([{str(corpus)!r}], setup=setup({str(tmp_path / 'many')!r}, "
        f"checkpoint={str(build_checkpoint())!r}), workers=2, on_progress=stop)\n"
    )
    script = tmp_path / "run.py"
    script.write_text(program)

    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    half = len(contents(tmp_path / "many"))
    report = index_files([corpus], setup=setup(tmp_path / "many"), workers=2)

    assert 0 < half < len(expected)
    assert report.chunks_added == len(expected) - half
    assert_same(contents(tmp_path / "many"), expected)


def test_a_share_that_kills_every_worker_is_left_out_and_named(corpus, tmp_path):
    (corpus / "zz.txt").write_text("This is deadly. " * 200)

    report = index_files([corpus], setup=setup(tmp_path / "store"), workers=1)

    assert report.restarts in (2, 3)
    (error,) = [each for each in report.errors if each.source.endswith("zz.txt")]
    assert "3 workers died" in error.message
    assert {Path(each.source).name for each in report.errors} < {"zz.txt", "note_39.txt"} | {
        file.name for file in corpus.iterdir()
    }


def test_an_unreadable_file_is_named_and_keeps_what_it_had(corpus, tmp_path):
    index_files([corpus], setup=setup(tmp_path / "store"), workers=1)
    before = set(contents(tmp_path / "store"))
    (corpus / "note_00.txt").write_bytes(b"\xff\xfe\xff")

    report = index_files([corpus], setup=setup(tmp_path / "store"), workers=1)

    assert [Path(error.source).name for error in report.errors] == ["note_00.txt"]
    assert set(contents(tmp_path / "store")) == before


def test_what_fails_in_a_worker_fails_the_run_with_its_own_words(corpus, tmp_path):
    broken = tmp_path / "checkpoint"
    broken.mkdir()
    for file in build_checkpoint().rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            (broken / file.relative_to(build_checkpoint())).parent.mkdir(exist_ok=True)
            (broken / file.relative_to(build_checkpoint())).write_bytes(file.read_bytes())

    with pytest.raises(CheckpointError):
        index_files([corpus], setup=setup(tmp_path / "store", checkpoint=str(broken)), workers=2)
    assert active_children() == []


@pytest.mark.parametrize("error", [ConnectionError("gone"), OSError("disk full"), SystemExit(3)])
def test_what_the_callers_own_callback_raises_ends_the_run(corpus, tmp_path, error):
    def fail(now, total):
        raise error

    with pytest.raises(type(error)) as raised:
        index_files([corpus], setup=setup(tmp_path / "store"), workers=2, on_progress=fail)
    stopped_at = len(contents(tmp_path / "store"))
    index_files([corpus], setup=setup(tmp_path / "store"), workers=1)

    assert raised.value is error
    assert active_children() == []
    expected = by_one_process(corpus, tmp_path / "one")
    assert 0 < stopped_at < len(expected)
    assert_same(contents(tmp_path / "store"), expected)


def test_what_the_callback_raises_about_the_last_share_is_not_lost(corpus, tmp_path):
    error = OSError("disk full")

    def fail(now, total):
        if now.nbytes == total:
            raise error

    with pytest.raises(OSError, match="disk full") as raised:
        index_files([corpus], setup=setup(tmp_path / "store"), workers=1, on_progress=fail)

    assert raised.value is error
    expected = by_one_process(corpus, tmp_path / "one")
    assert_same(contents(tmp_path / "store"), expected)


def test_a_worker_tells_of_a_connection_that_failed_and_is_not_replaced(corpus, tmp_path):
    setup_ = setup(tmp_path / "store", embedder=UnreachableEmbedder)

    with pytest.raises(SoftRAGError, match="the embedding server refused"):
        index_files([corpus], setup=setup_, workers=1)


def test_a_store_of_another_model_is_refused_before_any_worker_starts(corpus, tmp_path):
    index_files([corpus / "note_00.txt"], setup=setup(tmp_path / "store"), workers=1)

    other = str(build_checkpoint(seed=1))

    with pytest.raises(MemoryMismatchError, match="index the documents again"):
        index_files([corpus], setup=setup(tmp_path / "store", checkpoint=other), workers=1)


def test_workers_compress_at_the_rate_asked_for(corpus, tmp_path):
    several = tmp_path / "checkpoint"
    build_model(rates=[2, 4]).save_pretrained(several)
    made = setup(tmp_path / "store", checkpoint=str(several), rate=2)

    index_files([corpus / "note_00.txt"], setup=made, workers=1)

    ((*_, values),) = contents(tmp_path / "store").values()
    with SoftRAG.from_pretrained(
        several, store=tmp_path / "store", embedder=HashingEmbedder(), load_decoder=False, rate=2
    ) as engine:
        (hit,) = engine.store.scroll()
    assert len(values) == -(-hit.memory.n_document_tokens // 2)


def test_an_actor_of_the_ray_recipe_stores_a_batch_once(tmp_path, monkeypatch):
    # Ray only moves batches to it; that is tried by hand, because Ray is no dependency.
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    recipe = runpy.run_path(str(ROOT / "deploy" / "ray_index.py"))
    batch = {
        "text": np.array(SENTENCES[:3], dtype=object),
        "source": np.array(["a", "b", None], dtype=object),
    }

    actor = recipe["Index"](setup(tmp_path / "store"))
    first, second = actor(batch), actor(batch)
    actor.indexer.store.close()

    assert first == {
        "documents": [3],
        "chunks_added": [3],
        "chunks_unchanged": [0],
        "left_out": [0],
    }
    assert (second["chunks_added"], second["chunks_unchanged"]) == ([0], [3])
    assert {said[1] for said in contents(tmp_path / "store").values()} == {"a", "b", None}


# Pruning


def test_files_that_vanished_are_pruned_on_request(corpus, tmp_path):
    index_files([corpus], setup=setup(tmp_path / "store"), workers=1)
    (corpus / "note_00.txt").unlink()
    (corpus / "note_01.txt").unlink()

    kept = index_files([corpus], setup=setup(tmp_path / "store"), workers=1)
    pruned = index_files([corpus], setup=setup(tmp_path / "store"), workers=1, prune=True)

    assert (kept.sources_pruned, pruned.sources_pruned) == (0, 2)
    sources = {said[1] for said in contents(tmp_path / "store").values()}
    # What has a name of its own in a JSON lines file is no file, and stays.
    assert sources == {f"list {n}" for n in range(5)} | {str(file) for file in corpus.glob("*.txt")}


def test_an_empty_folder_prunes_nothing(corpus, tmp_path):
    index_files([corpus], setup=setup(tmp_path / "store"), workers=1)
    before = set(contents(tmp_path / "store"))
    for file in corpus.iterdir():
        file.unlink()

    with pytest.raises(StoreError, match=r"nothing was pruned.*mounted"):
        index_files([corpus], setup=setup(tmp_path / "store"), workers=1, prune=True)
    assert set(contents(tmp_path / "store")) == before
