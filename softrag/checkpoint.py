"""A trained model as a folder: config.json, safetensors shards, tokenizers; never pickle.

Only what training changed is stored; base models are named. It knows the model's parts by their
parameter names alone. Folders of other projects become the same `Source` in `softrag.layouts`.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub import HfApi, save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from softrag.adapters import is_lora_weight
from softrag.base_models import quiet_loading, resolve_base_model
from softrag.config import SoftRAGConfig
from softrag.errors import CheckpointError
from softrag.prompt import prompt_signature

if TYPE_CHECKING:
    from softrag.model import SoftRAGModel

logger = logging.getLogger(__name__)

DEMO_MODELS = {"softrag-demo": "checkpoint", "softrag-demo-oscar": "checkpoint_oscar"}
"""The small models that come with the package, and their folders: the second is query-dependent."""

COMPRESSOR_WEIGHTS = ("connector.", "word_projection.", "memory_embedding", "rerank_")
DECODER_WEIGHTS = ("auto_encoding_embedding",)
"""Beginnings of the names of parameters that no base model has, by the part they come with."""

STORAGES = ("full", "int8")
_DIFFERENCE, _SCALE = ".difference", ".difference_scale"
_CONFIG = "config.json"
_SHARED_TOKENIZER = "tokenizer"
_HF_FIELDS = {"architectures", "auto_map", "torch_dtype", "dtype", "transformers_version"}


class StoredTensor(NamedTuple):
    """A tensor under the name it has in a `SoftRAGModel`, and the file it comes from."""

    name: str
    values: torch.Tensor
    file: Path


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint that is ready to be loaded.

    Attributes:
        folder: Where it is.
        layout: Whose files these are, such as "softrag" or "pisco".
        config: What it is, in softrag's terms.
        compressor_tokenizer: With the checkpoint's special tokens.
        decoder_tokenizer: The same, of the decoder.
        tensors: Reads the tensors whose names are wanted.
    """

    folder: Path
    layout: str
    config: SoftRAGConfig
    compressor_tokenizer: PreTrainedTokenizerBase
    decoder_tokenizer: PreTrainedTokenizerBase
    tensors: Callable[[Callable[[str], bool]], Iterator[StoredTensor]]


def locate(name: str | Path, *, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint: the path itself, a demo model's, or a hub download's.

    Raises:
        CheckpointError: Neither a folder with a config.json nor a reachable hub name.
    """
    path = Path(name)
    if str(name) in DEMO_MODELS:
        path = Path(__file__).parent / "demo" / DEMO_MODELS[str(name)]
    if path.is_dir():
        if not (path / _CONFIG).is_file():
            raise CheckpointError(
                f"{path} has no {_CONFIG}; expected a folder written by "
                "SoftRAGModel.save_pretrained."
            )
        return path
    # A hub name may go on with a folder inside the repository (CLaRa keeps one per rate).
    owner_and_name, inside = "/".join(path.parts[:2]), path.parts[2:]
    try:
        if not inside:
            return Path(snapshot_download(str(name), revision=revision))
        wanted = "/".join(inside)
        found = snapshot_download(owner_and_name, revision=revision, allow_patterns=f"{wanted}/*")
        if (Path(found, *inside) / _CONFIG).is_file():
            return Path(found, *inside)
        raise FileNotFoundError(f"{owner_and_name} has no {wanted}/{_CONFIG}")
    except Exception as error:
        # The hub client raises a dozen unrelated classes for "not there" and "not reachable".
        raise CheckpointError(
            f"{str(name)!r} is neither a folder nor a model that the hub serves ({error}). Give "
            "the path of a folder written by SoftRAGModel.save_pretrained."
        ) from error


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


def open_source(folder: Path) -> Source:
    """Open a folder written by `save`.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    config = read_config(folder)
    return Source(
        folder=folder,
        layout=SoftRAGConfig.model_type,
        config=config,
        compressor_tokenizer=read_tokenizer(folder, "compressor_tokenizer"),
        decoder_tokenizer=read_tokenizer(folder, "decoder_tokenizer"),
        tensors=lambda wanted: read_safetensors(
            folder, "model", wanted, checksums=config.checksums
        ),
    )


def read_config(folder: Path) -> SoftRAGConfig:
    """Read and check config.json; an unknown field is an error, not a silent default.

    Raises:
        CheckpointError: The file is damaged or belongs to another kind of model.
    """
    path = folder / _CONFIG
    values = read_json(path)
    found = values.get("model_type")
    if found != SoftRAGConfig.model_type:
        raise CheckpointError(
            f"{path} says model_type {found!r}; expected {SoftRAGConfig.model_type!r}. Another "
            "project's checkpoint is converted by: softrag convert SOURCE FOLDER"
        )
    unknown = set(values) - set(SoftRAGConfig().to_dict()) - _HF_FIELDS
    if unknown:
        raise CheckpointError(
            f"{path} has unknown fields {sorted(unknown)}. It was written by a newer softrag, or "
            "by hand; update softrag or remove them."
        )
    try:
        return SoftRAGConfig(**{k: v for k, v in values.items() if k != "model_type"})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds an invalid value: {error}") from error


def read_tokenizer(folder: Path, part: str) -> PreTrainedTokenizerBase:
    """Load `"compressor_tokenizer"` or `"decoder_tokenizer"`, which may be one and the same."""
    path = folder / part
    if not path.is_dir():
        path = folder / _SHARED_TOKENIZER
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise CheckpointError(f"The tokenizer in {path} can't be loaded: {error}") from error


# ---------------------------------------------------------------------- save


def save(model: SoftRAGModel, folder: Path, *, storage: str, max_shard_size: int) -> None:
    """Write a checkpoint; see `SoftRAGModel.save_pretrained`."""
    if storage not in STORAGES:
        raise ValueError(f"storage is {storage!r}; expected one of {STORAGES}.")
    if storage == "int8" and model.config.compressor_vocabulary is not None:
        raise ValueError(
            "storage 'int8' stores differences to base weights, and this compressor has embeddings "
            "of its own (compressor_vocabulary); use storage 'full'."
        )
    if model.decoder is None or model.compressor is None:
        raise ValueError("Only a model with both compressor and decoder can be saved.")
    trained = {n: t.detach().cpu().contiguous() for n, t in model.trained_state().items()}
    stored = trained
    if storage == "int8":
        base = _base_weights(model, trained)
        stored = _shrink(trained, base)
        # What a reader will have: the fingerprint is of the rounded weights.
        trained = _restore(stored, base)
    values = {k: v for k, v in model.config.to_dict().items() if k != "model_type"}
    config = SoftRAGConfig(**values | {"storage": storage})
    config.architectures = [type(model).__name__]
    config.fingerprint = fingerprint(model, trained)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as name:
        # Everything is written aside first: a crash while writing leaves the old checkpoint whole.
        part = Path(name)
        save_torch_state_dict(stored, part, max_shard_size=max_shard_size)
        _save_tokenizers(model, part)
        config.checksums = {f.name: _checksum(f) for f in sorted(part.glob("*.safetensors"))}
        config.save_pretrained(part)
        for old in folder.glob("model*.safetensors*"):
            old.unlink()
        for item in sorted(part.iterdir(), key=lambda path: path.name == _CONFIG):
            target = folder / item.name
            if target.is_dir():
                shutil.rmtree(target)
            if item.is_file():
                item.chmod(0o644)  # The writer's own mode hides weights from other users.
            item.replace(target)


def upload(folder: Path, repo_id: str) -> None:
    """Push a checkpoint folder to the hub."""
    api = HfApi()
    api.create_repo(repo_id, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repo_id)


def _save_tokenizers(model: SoftRAGModel, folder: Path) -> None:
    compressor, decoder = model.compressor_tokenizer, model.decoder_tokenizer
    assert compressor is not None
    assert decoder is not None
    if _tokenizer_signature(compressor) == _tokenizer_signature(decoder):
        decoder.save_pretrained(folder / _SHARED_TOKENIZER)
        return
    compressor.save_pretrained(folder / "compressor_tokenizer")
    decoder.save_pretrained(folder / "decoder_tokenizer")


def _is_trained_base_weight(name: str) -> bool:
    """Tell whether a trained tensor replaces a base weight, rather than adding to it."""
    return name.startswith("compressor.") and not is_lora_weight(name)


def _base_weights(model: SoftRAGModel, trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Load the untrained values of the trained base weights, in float32."""
    if not any(map(_is_trained_base_weight, trained)):
        return {}
    path = resolve_base_model(str(model.config.compressor))
    with quiet_loading():
        state = AutoModel.from_pretrained(path, dtype=torch.float32).state_dict()
    return {f"compressor.{name}": tensor for name, tensor in state.items()}


def _shrink(
    trained: dict[str, torch.Tensor], base: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Round trained base matrices to 8-bit differences, everything else to bfloat16."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in trained.items():
        if _is_trained_base_weight(name) and tensor.ndim == 2:
            difference = tensor.float() - base[name]
            scale = difference.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
            stored[name + _DIFFERENCE] = (difference / scale).round().to(torch.int8)
            stored[name + _SCALE] = scale
        else:
            stored[name] = tensor.to(torch.bfloat16)
    return stored


def _restore(
    stored: dict[str, torch.Tensor], base: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Undo `_shrink`, up to its rounding; tensors stored whole pass through."""
    trained: dict[str, torch.Tensor] = {}
    for key, tensor in stored.items():
        if key.endswith(_DIFFERENCE):
            name = key.removesuffix(_DIFFERENCE)
            trained[name] = base[name].float() + tensor.float() * stored[name + _SCALE]
        elif not key.endswith(_SCALE):
            trained[key] = tensor
    return trained


# ---------------------------------------------------------------------- load


def load_weights(model: SoftRAGModel, source: Source) -> None:
    """Fill a model that holds its base weights with what training changed.

    Every trained tensor of the loaded parts must be there once, and nothing unknown.

    Raises:
        CheckpointError: A file is missing or damaged, or the tensors are not the model's.
    """
    parameters = model.trained_parameters()
    absent = tuple(
        prefix
        for part, prefixes in (
            (
                model.compressor,
                ("compressor.", *COMPRESSOR_WEIGHTS),
            ),
            (model.decoder, ("decoder.", *DECODER_WEIGHTS)),
        )
        if part is None
        for prefix in prefixes
    )

    def is_wanted(name: str) -> bool:
        return _plain(name) in parameters or not name.startswith(absent)

    stored = {tensor.name: tensor for tensor in source.tensors(is_wanted)}
    names = {_plain(name) for name in stored}
    if names != set(parameters):
        unknown = {
            f"{_plain(name)} ({tensor.file.name})"
            for name, tensor in stored.items()
            if _plain(name) not in parameters
        }
        raise CheckpointError(
            f"The weights in {source.folder} are not those of its {_CONFIG}. "
            f"Missing: {_some(set(parameters) - names)}. Unknown: {_some(unknown)}. "
            "Restore the folder, or fix its config.json."
        )
    try:
        base = {name: parameters[name].detach() for name in names}
        trained = _restore({name: tensor.values for name, tensor in stored.items()}, base)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"A stored difference in {source.folder} is incomplete: {error}"
        ) from error
    for name, tensor in trained.items():
        file = stored[name].file if name in stored else source.folder
        if not tensor.is_floating_point():
            raise CheckpointError(f"{name} in {file} is {tensor.dtype}; expected floating point.")
        target = parameters[name]
        if target.shape != tensor.shape:
            raise CheckpointError(
                f"{name} in {file} is {tuple(tensor.shape)}; the model needs "
                f"{tuple(target.shape)}. The config.json or the base model is not the checkpoint's."
            )
        target.data.copy_(tensor)
        if not torch.isfinite(target).all():
            raise CheckpointError(f"{name} in {file} holds NaN or infinity. Restore the file.")


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
            f"{folder} holds the weight files {[file.name for file in files]}, and its {_CONFIG} "
            f"says {sorted(checksums)}. Copy or download the checkpoint again."
        )
    for file in files:
        try:
            if checksums is not None and _checksum(file) != checksums[file.name]:
                raise CheckpointError(
                    f"{file} is damaged: it does not match the checksum in {_CONFIG}. Copy or "
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


def _checksum(file: Path) -> str:
    digest = blake2b(digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_file_name(name: object) -> bool:
    # An index may not lead out of its folder.
    return isinstance(name, str) and Path(name).name == name


def _plain(name: str) -> str:
    return name.removesuffix(_DIFFERENCE).removesuffix(_SCALE)


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown or "none"


# ---------------------------------------------------------------------- fingerprint


def fingerprint(model: SoftRAGModel, trained: dict[str, torch.Tensor] | None = None) -> str:
    """Hash everything that decides a memory's values, to 32 hex digits.

    Trained weights in full, base weights by samples of each tensor, the tokenizer by its
    vocabulary and a probe, and the document prompt's settings. Floating point values are hashed
    as bfloat16, so that loading in another dtype does not change the result.
    """
    assert model.compressor is not None
    assert model.compressor_tokenizer is not None
    digest = blake2b(digest_size=16)
    digest.update(prompt_signature(model.config).encode())
    digest.update(_tokenizer_signature(model.compressor_tokenizer))
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


def _tokenizer_signature(tokenizer: PreTrainedTokenizerBase) -> bytes:
    digest = blake2b(digest_size=16)
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest.update(json.dumps(vocabulary).encode())
    probe = "The 12 tokens,\n\n1. don't  split\tthe same: caf\u00e9 \u4e2d\u6587 x=3.14"
    digest.update(json.dumps(tokenizer.encode(probe, add_special_tokens=False)).encode())
    return digest.digest()
