"""Checkpoints of any layout, written as softrag's own, and decoders that any engine serves."""

from __future__ import annotations

from pathlib import Path

import torch

from softrag import checkpoint, layouts
from softrag.card import write_card
from softrag.errors import CheckpointError
from softrag.export import export_decoder
from softrag.model import SoftRAGModel

DECODER = "decoder"
"""The folder of the merged decoder, inside that of the converted checkpoint."""


def convert(
    source: str | Path,
    folder: str | Path,
    *,
    merge: bool = False,
    dtype: torch.dtype | None = None,
    base_model: str | Path | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> Path:
    """Write a checkpoint as safetensors in softrag's layout, with a card that keeps its licence.

    Memories of the source and of the result are interchangeable: the fingerprint is the same, up to
    the rounding that `dtype` asks for.

    Args:
        source: A folder or hub name, of any layout.
        folder: Where to write; created when missing.
        merge: Also write the decoder with its adapters merged, to `folder / "decoder"`: a plain
            checkpoint for vLLM and others. Its logits are compared with the adapted decoder's.
        dtype: Of the written weights; None: as stored.
        base_model: As in `SoftRAGModel.from_pretrained`.
        device: Where the logits are computed; None chooses.
        revision: Of a hub checkpoint.

    Returns:
        The folder.

    Raises:
        CheckpointError: The source can't be loaded, the merge changes nothing or the merged logits
            differ, or `folder` is the source.
    """
    found = checkpoint.locate(source, revision=revision)
    folder = Path(folder)
    if folder.resolve() == found.resolve():
        raise CheckpointError(f"{folder} is the source itself. Give another folder to write to.")
    dtype = dtype or _stored_dtype(found, base_model)
    model = SoftRAGModel.from_pretrained(found, base_model=base_model, dtype=dtype, device=device)
    kind = layouts.summarize(found).layout
    model.save_pretrained(folder, max_shard_size=5_000_000_000)
    facts = [
        f"Layout of the source: `{kind}`. Stored as {str(dtype).removeprefix('torch.')}.",
        f"Fingerprint of the memories it makes: `{model.fingerprint}`.",
    ]
    if merge:
        export_decoder(model, folder / DECODER, dtype=dtype)
        facts.append(
            f"`{DECODER}/` is the decoder with its adapters merged. That the merge changed the "
            "weights, and that its logits are the adapted decoder's, was checked when it was "
            "written."
        )
    write_card(
        folder,
        source=found,
        source_name=str(source),
        base_model=model.config.decoder,
        facts=facts,
    )
    return folder


def _stored_dtype(folder: Path, base_model: str | Path | None) -> torch.dtype:
    tensors = layouts.open_source(folder, base_model=base_model).tensors(lambda _: True)
    return next((t.values.dtype for t in tensors if t.values.is_floating_point()), torch.bfloat16)
