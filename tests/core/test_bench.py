"""What `softrag bench` promises: whole records, floors that can be trusted, a picture."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from softrag.bench.decode import Floors, bench_single, make_requests
from softrag.bench.measure import Hardware, Recorder, Result, commit
from softrag.bench.plot import save_plot
from softrag.bench.presets import PRESETS, build_model, random_texts
from softrag.cli.app import app
from softrag.decoder import TorchDecoder
from tests.embedders import HashingEmbedder

CPU = torch.device("cpu")
FIELDS = {
    "name", "value", "unit", "floor", "device", "versions", "commit", "command", "seed",
}  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, arguments)


@pytest.fixture(scope="module")
def model():
    return build_model("tiny", device=CPU, dtype=torch.float32)


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (
            "compress --documents 6",
            ["compress, 128 tokens", "compress, real lengths", "compress naively, 128 tokens"],
        ),
        (
            "decode --documents 1,3 --batches 2 --arrivals 3 --max-new-tokens 4",
            [
                "naive, memory, batch 1: 4 tokens",
                "memory, 1 documents, batch 1: first token",
                "text, 3 documents, batch 1: each further token",
                "memory, 5 documents, batch 2: answers",
                "batch 2: text over memory",
                "3 mixed answers, at once",
            ],
        ),
        (
            "end-to-end --chunks 6 --questions 2 --max-new-tokens 3",
            ["index", "naive loop, memory: answers", "ask, memory: first token"],
        ),
    ],
)
def test_random_weights_are_measured_without_a_download(command, names, monkeypatch):
    monkeypatch.setattr("softrag.embedder.default_embedder", HashingEmbedder)

    done = run("bench", *command.split(), "--random-weights", "tiny", "--device", "cpu", "--json")

    results = json.loads(done.stdout)
    assert all(set(result) == FIELDS for result in results)
    assert all(result["value"] > 0 for result in results)
    assert set(names) <= {result["name"] for result in results}


def test_an_answer_that_ends_at_once_has_no_further_tokens_to_measure(model):
    recorder = Recorder(device=CPU)
    floors = Floors(model, Hardware(bandwidth=1e9, matmul=1e9))

    bench_single(TorchDecoder(model), recorder, floors, documents=1, new_tokens=1)

    assert [result.name.split(": ")[1] for result in recorder.results] == [
        "prompt",
        "first token",
    ] * 2


def test_the_store_is_measured():
    done = run("bench", "store", "--chunks", "20", "--hidden", "16", "--json")

    names = [result["name"] for result in json.loads(done.stdout)]
    assert "store, 20 chunks: write" in names
    assert "store, 20 chunks: search, 5 with memories" in names


def test_an_unknown_preset_is_refused_with_those_there_are():
    done = run("bench", "compress", "--random-weights", "gpt")

    assert done.exit_code == 1
    assert all(preset in done.stderr for preset in PRESETS)


def test_a_presets_texts_and_prompts_have_the_tokens_they_should(model):
    tokenizer = model.decoder_tokenizer
    assert [len(tokenizer.encode(text)) for text in random_texts(tokenizer, 3, 128)] == [128] * 3
    decoder = TorchDecoder(model)
    text, memory = (make_requests(model, 1, mode)[0] for mode in ("text", "memory"))

    saved = decoder.prompt_tokens("", text.documents) - decoder.prompt_tokens("", memory.documents)

    assert saved == 5 * (128 - 8)


def test_floors_count_weights_once_and_cached_tokens_per_row(model):
    # One byte a second: the time is the number of bytes.
    floors = Floors(model, Hardware(bandwidth=1.0, matmul=float("inf")))
    decoder = model.decoder
    read = [*decoder.model.layers.parameters(), decoder.lm_head.weight]
    weights = 4 * sum(p.numel() for p in read if p.shape[0] != 16 and p.shape[-1] != 16)
    cached = 4 * 2 * 2 * 2 * 16  # float32, keys and values, layers, heads, width

    assert floors.step(3, 10) == weights + 3 * 10 * cached
    assert floors.prefill(2, 7) == weights + 2 * 7 * cached


def test_a_ratio_is_one_at_the_hardwares_limit_and_more_above():
    recorder = Recorder(device=CPU)

    assert recorder.add("time", 3.0, "s", 1.5).ratio == 2.0
    assert recorder.add("rate", 3.0, "documents/s", 6.0).ratio == 2.0
    assert recorder.add("count", 3.0, "times").ratio is None


def test_a_picture_shows_latency_and_throughput(tmp_path):
    pytest.importorskip("matplotlib")
    values = {
        "device": "cpu", "versions": {}, "commit": "", "command": "", "seed": 0, "floor": 0.1,
    }  # fmt: skip
    results = [
        Result(name=name, value=2.0, unit="s", **values)
        for name in (
            "text, 1 documents, batch 1: first token",
            "text, 5 documents, batch 1: first token",
            "memory, 5 documents, batch 8: answers",
        )
    ]

    save_plot(results, tmp_path / "plot.svg")

    drawn = (tmp_path / "plot.svg").read_text()
    assert all(text in drawn for text in ("text", "memory", "answers per second"))


def test_where_there_is_no_git_a_record_names_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))

    assert commit() == ""
