"""Fixtures for tests of the command: documents, a store of them, an embedder without a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import run
from tests.embedders import HashingEmbedder
from tests.families import SENTENCES


@pytest.fixture(autouse=True)
def small_embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command finds chunks with."""
    monkeypatch.setattr("softrag.engine.default_embedder", HashingEmbedder)
    monkeypatch.setattr("softrag.embedder.default_embedder", HashingEmbedder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file for each sentence."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for number, text in enumerate(SENTENCES):
        (folder / f"note_{number}.txt").write_text(text)
    return folder


@pytest.fixture
def store(tmp_path: Path, folder: Path) -> Path:
    """A store with the folder's documents."""
    assert run("index", folder, store=tmp_path / "store").exit_code == 0
    return tmp_path / "store"
