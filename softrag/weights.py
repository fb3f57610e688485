"""Trained weights on disk: safetensors files with checksums, whole or in 8 or 4 bits.

It knows the parts of a model by the names of their parameters alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from softrag.adapters import is_lora_weight
from softrag.errors import CheckpointError

if TYPE_CHECKING:
    from softrag.model import SoftRAGModel

COMPRESSOR_WEIGHTS = ("connector.", "word_projection.", "memory_embedding", "rerank_")
DECODER_WEIGHTS = ("auto_encoding_embedding",)
"""Beginnings of the names of parameters that no base model has, by the part they come with."""

FIXED_WEIGHTS = ("connector.mean", "connector.std", "connector.gain")
"""Names of the parameters among them that are measured and never trained."""

# What a matrix is stored as in few bits: its difference to a base weight, or itself.
_DIFFERENCE, _DIFFERENCE_SCALE = ".difference", ".difference_scale"
_ROUNDED, _ROUNDED_SCALE = ".rounded", ".rounded_scale"
_SUFFIXES = (_DIFFERENCE_SCALE, _ROUNDED_SCALE, _DIFFERENCE, _ROUNDED)

_GROUP = 64
"""Values of a row that share a scale in 4 bits: one scale for all would drown the small ones."""


class StoredTensor(NamedTuple):
    """A tensor under the name it has in a `SoftRAGModel`, and the file it comes from."""

    name: str
    values: torch.Tensor
    file: Path


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        CheckpointError: It does not.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read: {error}. Restore the file.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object. Restore the file.")
    return values


def trained_parameters(model: SoftRAGModel) -> dict[str, nn.Parameter]:
    """Return every parameter that differs from the base models, by the name it is saved as."""
    parameters = {n: p for n, p in model.named_parameters() if _is_trained(model, n, p)}
    if model.config.shares_backbone and model.config.decoder_vocabulary is not None:
        # The decoder's embeddings, though the compressor may be loaded alone.
        assert model.decoder_embeddings_name is not None
        backbone = model.compressor if model.decoder is None else model.decoder
        if backbone is not None:
            embeddings = backbone.get_input_embeddings().weight
            parameters = {n: p for n, p in parameters.items() if p is not embeddings}
            parameters[model.decoder_embeddings_name] = embeddings
    return parameters


def _is_trained(model: SoftRAGModel, name: str, parameter: nn.Parameter) -> bool:
    if name.startswith(COMPRESSOR_WEIGHTS + DECODER_WEIGHTS) or is_lora_weight(name):
        return True
    if name.startswith("compressor."):
        assert model.compressor is not None
        if parameter is model.compressor.get_input_embeddings().weight:
            return model.config.compressor_vocabulary is not None
        return model.config.compressor_lora is None
    if model.config.decoder_vocabulary is None:
        return False
    assert model.decoder is not None
    ends = (model.decoder.get_input_embeddings(), model.decoder.get_output_embeddings())
    return any(parameter is end.weight for end in ends)


def is_trained_base_weight(name: str) -> bool:
    """Tell whether a trained tensor replaces a base weight, rather than adding to it."""
    return name.startswith("compressor.") and not is_lora_weight(name)


def shrink(
    trained: dict[str, torch.Tensor], base: dict[str, torch.Tensor], *, bits: int = 8
) -> dict[str, torch.Tensor]:
    """Round trained base matrices (their differences) and adapters to few bits, others to bf16.

    In 4 bits, rows that are no multiple of 64 long are rounded to 8.
    """
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in trained.items():
        if is_trained_base_weight(name) and tensor.ndim == 2:
            rounded, scale = _round_rows(tensor.float() - base[name], bits)
            stored |= {name + _DIFFERENCE: rounded, name + _DIFFERENCE_SCALE: scale}
        elif is_lora_weight(name):
            rounded, scale = _round_rows(tensor.float(), bits)
            stored |= {name + _ROUNDED: rounded, name + _ROUNDED_SCALE: scale}
        else:
            stored[name] = tensor.to(torch.bfloat16)
    return stored


def _round_rows(matrix: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rounded values, and their scales: one a row in 8 bits, one a group in 4.

    8 bits are int8 of the matrix' shape; 4 bits are two values in a uint8, the first one low.
    """
    packs = bits == 4 and matrix.shape[1] % _GROUP == 0
    largest = 7 if packs else 127
    groups = matrix.unflatten(1, (-1, _GROUP if packs else matrix.shape[1]))
    # Coarse, so that what was rounded before is rounded to itself: a compressor that is saved again
    # with another decoder keeps its fingerprint, and stores their memories.
    scale = (groups.abs().amax(dim=2).clamp_min(1e-12) / largest).to(torch.bfloat16)
    rounded = (groups / scale.float()[..., None]).round().flatten(1).to(torch.int8)
    if not packs:
        return rounded, scale
    low, high = (rounded + 8).to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return low | high << 4, scale


def _restore_rows(rounded: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Undo `_round_rows`, up to its rounding."""
    if rounded.dtype == torch.uint8:
        pairs = torch.stack((rounded & 15, rounded >> 4), dim=2)
        rounded = pairs.flatten(1).to(torch.int8) - 8
    groups = rounded.float().unflatten(1, (scale.shape[1], -1))
    return (groups * scale.float()[..., None]).flatten(1)


def restore(
    stored: dict[str, torch.Tensor], base: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Undo `shrink`, up to its rounding; tensors stored whole pass through."""
    trained: dict[str, torch.Tensor] = {}
    for key, tensor in stored.items():
        name = plain_name(key)
        if key.endswith(_DIFFERENCE):
            difference = _restore_rows(tensor, stored[name + _DIFFERENCE_SCALE])
            trained[name] = base[name].float() + difference
        elif key.endswith(_ROUNDED):
            trained[name] = _restore_rows(tensor, stored[name + _ROUNDED_SCALE])
        elif key == name:
            trained[name] = tensor
    return trained


def plain_name(name: str) -> str:
    """Return the name of the tensor that a stored one is, or is a part of."""
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def read_safetensors(
    folder: Path,
    stem: str,
    wanted: Callable[[str], bool],
    *,
    checksums: Mapping[str, str] | None = None,
) -> Iterator[StoredTensor]:
    """Read the wanted tensors of `stem.safetensors` or its shards, under the names in the files.

    Args:
        folder: Holds the files.
        stem: Their name.
        wanted: Tells by name whether a tensor is read.
        checksums: By file; None checks none. The format itself has no checksum, and a damaged
            weight is a weight.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
            raise CheckpointError(f"{index} names no files in its weight_map. Restore the file.")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    if not files:
        raise CheckpointError(f"{folder} holds no {stem}*.safetensors. Restore the folder.")
    if checksums is not None and {file.name for file in files} != set(checksums):
        raise CheckpointError(
            f"{folder} holds the weight files {[file.name for file in files]}, and its config.json "
            f"says {sorted(checksums)}. Copy or download the checkpoint again."
        )
    for file in files:
        try:
            if checksums is not None and checksum(file) != checksums[file.name]:
                raise CheckpointError(
                    f"{file} is damaged: it does not match the checksum in config.json. Copy or "
                    "download the checkpoint again."
                )
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():
                    if wanted(key):
                        yield StoredTensor(key, tensors.get_tensor(key), file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file} is missing or damaged ({error}). Copy or download the checkpoint again."
            ) from error


def checksum(file: Path) -> str:
    """Hash a file, to 32 hex digits."""
    digest = blake2b(digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_file_name(name: object) -> bool:
    # An index may not lead out of its folder.
    return isinstance(name, str) and Path(name).name == name
