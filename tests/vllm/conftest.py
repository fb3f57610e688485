"""Tests of the real vLLM; collected where it is installed. `make test-vllm` sets that up."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from softrag.decoder import TorchDecoder
from softrag.export import cached_export
from softrag.model import SoftRAGModel
from tests.vllm.questions import ask_demo
from tests.vllm.server import VLLMProcess

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

# vLLM asks the network for this machine's address unless it is told.
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")


@pytest.fixture(scope="session")
def requests():
    """Fifty questions about the demo's corpus, with the memories found for them."""
    return ask_demo()


@pytest.fixture(scope="session")
def in_process():
    """The demo model's decoder in this process, in float32."""
    model = SoftRAGModel.from_pretrained(
        "softrag-demo", load_compressor=False, dtype=torch.float32, device="cpu"
    )
    return TorchDecoder(model)


@pytest.fixture(scope="session")
def expected(in_process, requests):
    return in_process.generate(requests)


@pytest.fixture(scope="session")
def exported():
    return cached_export("softrag-demo", dtype=torch.float32)


@pytest.fixture(scope="session")
def server(exported):
    with VLLMProcess(exported, flags=["--enable-prompt-embeds"]) as process:
        yield process


@pytest.fixture(scope="session")
def plugin_server(exported):
    with VLLMProcess(exported, flags=VLLMProcess.PLUGIN_FLAGS) as process:
        yield process
