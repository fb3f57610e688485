"""Checkpoints as their makers published them, read as softrag's own.

A layout is recognised by the `model_type` in config.json. Whoever wrote the files, they become one
`Source`: a `SoftRAGConfig` whose prompts, tokens and lengths give the original's inputs token for
token, and tensors under softrag's names. No code of a checkpoint is ever run.

* "softrag"          written by `SoftRAGModel.save_pretrained`
* "COCOM", "CLaRa"   PISCO, OSCAR's family and CLaRa, as on the hub: `softrag.layouts.hub`
* "PISCO"            the research code of 2026: `softrag.layouts.research`
"""

from __future__ import annotations

from pathlib import Path

from softrag import checkpoint
from softrag.checkpoint import Source
from softrag.config import SoftRAGConfig
from softrag.errors import CheckpointError
from softrag.layouts import hub, research
from softrag.layouts.base import base_model_error
from softrag.layouts.summary import Summary
from softrag.weights import read_json

__all__ = ["base_model_error", "open_source", "summarize"]

_OTHERS = {"COCOM": hub, "CLaRa": hub, "PISCO": research}


def open_source(folder: Path, *, base_model: str | Path | None = None) -> Source:
    """Open a checkpoint of any layout; weights are read later.

    Args:
        folder: Holds the config.json.
        base_model: Where the decoder's base model is, when not where the checkpoint says; also the
            compressor's, where it has the same one.

    Raises:
        CheckpointError: The layout is unknown or not supported, a file is damaged, or a base model
            is not there.
    """
    kind = _kind(folder)
    if kind in _OTHERS:
        return _OTHERS[kind].open_source(folder, base_model=base_model)
    source = checkpoint.open_source(folder)
    config = source.config
    if base_model is not None:
        config.decoder = str(base_model)
        if not config.shares_backbone and config.compressor_config == config.decoder_config:
            config.compressor = str(base_model)
    return source


def summarize(folder: Path) -> Summary:
    """Say what a checkpoint of any layout is, from its config.json alone.

    Raises:
        CheckpointError: As in `open_source`, base models aside.
    """
    kind = _kind(folder)
    if kind in _OTHERS:
        return _OTHERS[kind].summarize(folder)
    config = checkpoint.read_config(folder)
    return Summary(
        layout=kind,
        decoder=config.decoder,
        compressor=config.compressor,
        rate=config.rate,
        memory_tokens=config.memory_tokens,
        max_document_tokens=config.max_document_tokens,
        query_dependent=config.query_dependent,
        fingerprint=config.fingerprint,
    )


def _kind(folder: Path) -> str:
    path = folder / "config.json"
    kind = read_json(path).get("model_type")
    if kind == SoftRAGConfig.model_type or kind in _OTHERS:
        return str(kind)
    known = ", ".join([SoftRAGConfig.model_type, *_OTHERS])
    raise CheckpointError(
        f"{path} says model_type {kind!r}; softrag reads {known}. For a plain language model, "
        "train a compressor first (python -m softrag_trainers)."
    )
