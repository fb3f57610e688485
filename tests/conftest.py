"""Fixtures for every test: tiny models, no network."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports huggingface_hub, which reads it once: tests never ask the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from tests.families import FAMILIES, build_family


@pytest.fixture(scope="session", params=list(FAMILIES))
def tiny_family(request: pytest.FixtureRequest) -> Path:
    """The folder of a tiny model and its tokenizer, once for every family; `.name` is the family's.

    Shared by the whole session: read it, write elsewhere.
    """
    return build_family(request.param)


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """The folder of a tiny Llama, for tests that need some model and not every family."""
    return build_family("Llama")
