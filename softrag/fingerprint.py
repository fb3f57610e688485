"""Of everything that decides a memory's values, one short hash: memories of equals are equal."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from softrag.config import SoftRAGConfig
from softrag.errors import CheckpointError
from softrag.weights import DECODER_WEIGHTS

if TYPE_CHECKING:
    from softrag.model import SoftRAGModel


def fingerprint_of(model: SoftRAGModel, trained: dict[str, torch.Tensor] | None = None) -> str:
    """Hash everything that decides a memory's values, to 32 hex digits.

    Trained weights in full, base weights by samples of each tensor, the tokenizer by its
    vocabulary and a probe, and the document prompt's settings. Floating point values are hashed
    as bfloat16, so that loading in another dtype does not change the result.
    """
    assert model.compressor is not None
    assert model.compressor_tokenizer is not None
    digest = blake2b(digest_size=16)
    digest.update(prompt_signature(model.config).encode())
    digest.update(tokenizer_signature(model.compressor_tokenizer))
    trained = model.trained_state() if trained is None else trained
    for name in sorted(trained):
        if not name.startswith(("decoder.", *DECODER_WEIGHTS, "rerank_")):
            digest.update(name.encode())
            digest.update(_bytes(trained[name]))
    brought = None
    if model.config.shares_backbone and model.config.decoder_vocabulary is not None:
        # Embeddings that the checkpoint brings decide both what is compressed and what is read.
        brought = model.compressor.get_input_embeddings().weight
    for name, parameter in sorted(model.compressor.named_parameters()):
        if f"compressor.{name}" not in trained:
            flat = parameter.detach().flatten()
            step = 1 if parameter is brought else max(1, len(flat) // 256)
            digest.update(name.encode())
            digest.update(_bytes(flat[::step]))
    return digest.hexdigest()


def prompt_signature(config: SoftRAGConfig) -> str:
    """Return the document prompt's settings in one canonical string, for the fingerprint.

    Not `rerank`: what stands behind the `<MEM>` tokens decides no memory.
    """
    settings = {
        "document_prompt": config.document_prompt,
        "rate": config.rate,
        "memory_tokens": config.memory_tokens,
        "max_document_tokens": config.max_document_tokens,
        "query_dependent": config.query_dependent,
        "readout": config.readout,
    }
    # Younger settings count where they are used, so that fingerprints of older models stay.
    default = SoftRAGConfig()
    for name in (
        "compressor_norm",
        "memory_count",
        "distinct_memory_tokens",
        "max_row_tokens",
        "prompt_encoding",
    ):
        if getattr(config, name) != getattr(default, name):
            settings[name] = getattr(config, name)
    return json.dumps(settings, sort_keys=True)


def fingerprint_at_rate(own: str, rate: int) -> str:
    """Return the fingerprint of a model that is asked for another rate than its config's.

    It follows from the model's own alone, so that a decoder without a compressor knows it too.
    """
    return blake2b(f"{own} at rate {rate}".encode(), digest_size=16).hexdigest()


def check_fingerprint(model: SoftRAGModel, folder: Path) -> None:
    """Compare a loaded compressor with the fingerprint in its config.json.

    Raises:
        CheckpointError: They differ.
    """
    expected, found = model.config.fingerprint, model.fingerprint
    if expected is not None and expected != found:
        raise CheckpointError(
            f"The compressor loaded from {folder} has fingerprint {found}; its config.json says "
            f"{expected}. A file was changed, or the base model {model.config.compressor!r} is "
            "not the one it was trained on."
        )


def _bytes(tensor: torch.Tensor) -> memoryview:
    rounded = tensor.detach().to(torch.bfloat16).contiguous().cpu()
    return rounded.view(torch.uint8).numpy().data


def tokenizer_signature(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Hash a tokenizer by its vocabulary and a probe."""
    digest = blake2b(digest_size=16)
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest.update(json.dumps(vocabulary).encode())
    probe = "The 12 tokens,\n\n1. don't  split\tthe same: caf\u00e9 \u4e2d\u6587 x=3.14"
    digest.update(json.dumps(tokenizer.encode(probe, add_special_tokens=False)).encode())
    return digest.digest()
