"""The page about adapting, command by command, with a tiny model and a teacher on the loopback."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from softrag.cli import app
from softrag_trainers import distractors
from softrag_trainers.__main__ import main
from softrag_trainers.examples import load_questions
from tests.chat_server import serve_chat
from tests.checkpoints import build_checkpoint
from tests.embedders import HashingEmbedder
from tests.families import SENTENCES

PAGE = Path(__file__).parents[2] / "docs" / "adapt.md"
# The page's sizes are for real documents, the tests' are for eight sentences.
SMALLER = {"-n 200": "-n 2", "-n +201": "-n +3", "--k 5": "--k 2"}
SHORT = ["optimizer.steps=2", "optimizer.batch_size=2", "data.max_new_tokens=4", "run.storage=full"]


def commands(url: str) -> list[list[str]]:
    """Return the page's commands, for small documents."""
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    for old, new in {**SMALLER, "http://localhost:8000/v1": url}.items():
        assert old in text, old
        text = text.replace(old, new)
    text = text.replace("softrag-demo", str(build_checkpoint()))
    return [shlex.split(line) for line in re.findall(r"^    (\S.*)$", text, re.MULTILINE)]


def reply(prompt: str) -> str:
    if "Write 2 different questions" not in prompt:
        return prompt.split("Background:\n")[1].split()[0]
    words = prompt.removeprefix("Text:\n").split("\n\nWrite")[0].split()
    return (
        f"Question: What is the last word behind {words[1]}?\nAnswer: {words[-1]}\n"
        f"Question: What is the second word of {words[-1]}?\nAnswer: {words[1]}"
    )


def run(command: list[str]) -> int:
    """Run a command as a shell would, ours without starting a process."""
    ours: dict[tuple[str, ...], Callable[[list[str]], int | None]] = {
        ("python", "-m", "softrag_trainers"): main,
        ("python", "-m", "softrag_trainers.distractors"): distractors.main,
        ("softrag",): lambda rest: CliRunner().invoke(app, rest, catch_exceptions=False).exit_code,
    }
    for start, function in ours.items():
        if tuple(command[: len(start)]) == start:
            return function(command[len(start) :]) or 0
    return subprocess.run(
        shlex.join(command).replace("'>'", ">"), shell=True, check=False
    ).returncode


def test_the_page_about_adapting_ends_in_a_model_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in ("softrag.engine", "softrag.embedder"):
        monkeypatch.setattr(f"{module}.default_embedder", HashingEmbedder)
    docs = tmp_path / "docs"
    docs.mkdir()
    for number, text in enumerate(SENTENCES):
        (docs / f"note{number}.txt").write_text(text)

    with serve_chat(reply) as server:
        ran = []
        for command in commands(server.url):
            if command[0] == "pip":
                continue
            if "finetune" in command:
                command += SHORT
            assert run(command) == 0, command
            ran.append(command)

    assert len(ran) == 10
    made, answered = load_questions("made.jsonl"), load_questions("answered.jsonl")
    assert len(answered) == len(made) - len(load_questions("dev.jsonl")) > 8
    assert all(row.gold.count(True) == 1 and len(row.documents) == 2 for row in answered)
    assert (tmp_path / "adapted" / "config.json").is_file()
