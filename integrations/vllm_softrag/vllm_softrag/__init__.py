"""vLLM plugin: memories of softrag are sent once and referred to by hash afterwards.

vLLM knows items that come with a prompt as images, audio or video. A memory travels as an image
whose embeddings are computed already: vLLM then caches it under its hash, puts it at its place in
the prompt and takes the hash into the keys of its prefix cache.
"""

from __future__ import annotations

from importlib.metadata import version

import vllm
from vllm import ModelRegistry

__all__ = ["ARCHITECTURES", "register"]

ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Decoder families, as in the names of their vLLM classes."""


def register() -> None:
    """Make the models known to vLLM; called by vLLM in each of its processes.

    Raises:
        RuntimeError: The installed vLLM is another than this plugin was written for.
    """
    written_for = version("softrag-memory-vllm").rpartition(".")[0]
    if not vllm.__version__.startswith(f"{written_for}."):
        raise RuntimeError(
            f"softrag-memory-vllm {written_for} is for vLLM {written_for}, but found vLLM "
            f"{vllm.__version__}. Install softrag-memory-vllm of the same first two numbers."
        )
    for family in ARCHITECTURES:
        name = f"SoftRAG{family}ForCausalLM"
        # By name: importing a model would initialise devices before vLLM's processes fork.
        ModelRegistry.register_model(name, f"vllm_softrag.model:{name}")
