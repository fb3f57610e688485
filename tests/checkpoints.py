"""Tiny softrag models, as trained ones would be saved."""

from __future__ import annotations

import atexit
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from softrag.config import SoftRAGConfig
from softrag.model import SoftRAGModel
from tests.families import build_family


def build_model(family: str | Path = "Llama", *, seed: int = 0, **changes: Any) -> SoftRAGModel:
    """Build a tiny model with adapters and connector as if trained; `changes` go to the config."""
    folder = build_family(family) if isinstance(family, str) else family
    values: dict[str, Any] = {
        "decoder": str(folder),
        "compressor": str(folder),
        "rate": 4,
        "max_document_tokens": 64,
        "connector_hidden": 16,
        "decoder_lora": {"r": 4, "alpha": 8},
    }
    model = SoftRAGModel.from_base(SoftRAGConfig(**values | changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.trained_state().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
    model.forget_fingerprint()
    return model


@cache
def build_checkpoint(*, seed: int = 0, query_dependent: bool = False, rerank: bool = False) -> Path:
    """Save a tiny model and return its folder, which lives as long as the process."""
    parent = tempfile.TemporaryDirectory(prefix="softrag-checkpoint-")
    atexit.register(parent.cleanup)
    folder = Path(parent.name) / "checkpoint"
    changes = {"query_dependent": query_dependent, "rerank": rerank}
    build_model(seed=seed, **changes).save_pretrained(folder)
    return folder
