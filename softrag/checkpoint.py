"""A trained model as a folder: config.json, safetensors shards, tokenizers; never pickle.

Only what training changed is stored; base models are named. Folders of other projects become the
same `Source` in `softrag.layouts`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import HfApi, save_torch_state_dict, snapshot_download
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from softrag.base_models import quiet_loading, resolve_base_model
from softrag.config import SoftRAGConfig
from softrag.errors import CheckpointError
from softrag.fingerprint import fingerprint_of, tokenizer_signature
from softrag.weights import (
    COMPRESSOR_WEIGHTS,
    DECODER_WEIGHTS,
    StoredTensor,
    checksum,
    is_trained_base_weight,
    plain_name,
    read_json,
    read_safetensors,
    restore,
    shrink,
    trained_parameters,
)

if TYPE_CHECKING:
    from softrag.model import SoftRAGModel

DEMO_MODELS = {"softrag-demo": "checkpoint", "softrag-demo-oscar": "checkpoint_oscar"}
"""The small models that come with the package, and their folders: the second is query-dependent."""

STORAGES = ("full", "int8", "int4")
_CONFIG = "config.json"
_SHARED_TOKENIZER = "tokenizer"
_HF_FIELDS = {"architectures", "auto_map", "torch_dtype", "dtype", "transformers_version"}


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
        # The hub client raises a dozen unrelated classes for "not there" and "not reachable", some
        # with line breaks.
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{str(name)!r} is neither a folder nor a model that the hub serves ({reason}). Give "
            "the path of a folder written by SoftRAGModel.save_pretrained."
        ) from error


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
    if storage != "full" and model.config.compressor_vocabulary is not None:
        raise ValueError(
            f"storage {storage!r} stores differences to base weights, and this compressor has "
            "embeddings of its own (compressor_vocabulary); use storage 'full'."
        )
    if model.decoder is None or model.compressor is None:
        raise ValueError("Only a model with both compressor and decoder can be saved.")
    trained = {n: t.detach().cpu().contiguous() for n, t in model.trained_state().items()}
    stored = trained
    if storage != "full":
        base = _base_weights(model, trained)
        stored = shrink(trained, base, bits=4 if storage == "int4" else 8)
        # What a reader will have: the fingerprint is of the rounded weights.
        trained = restore(stored, base)
    values = {k: v for k, v in model.config.to_dict().items() if k != "model_type"}
    config = SoftRAGConfig(**values | {"storage": storage})
    config.architectures = [type(model).__name__]
    config.fingerprint = fingerprint_of(model, trained)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as name:
        # Everything is written aside first: a crash while writing leaves the old checkpoint whole.
        part = Path(name)
        save_torch_state_dict(stored, part, max_shard_size=max_shard_size)
        _save_tokenizers(model, part)
        config.checksums = {f.name: checksum(f) for f in sorted(part.glob("*.safetensors"))}
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
    if tokenizer_signature(compressor) == tokenizer_signature(decoder):
        decoder.save_pretrained(folder / _SHARED_TOKENIZER)
        return
    compressor.save_pretrained(folder / "compressor_tokenizer")
    decoder.save_pretrained(folder / "decoder_tokenizer")


def _base_weights(model: SoftRAGModel, trained: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Load the untrained values of the trained base weights, in float32."""
    if not any(map(is_trained_base_weight, trained)):
        return {}
    path = resolve_base_model(str(model.config.compressor))
    with quiet_loading():
        state = AutoModel.from_pretrained(path, dtype=torch.float32).state_dict()
    return {f"compressor.{name}": tensor for name, tensor in state.items()}


# ---------------------------------------------------------------------- load


def load_weights(model: SoftRAGModel, source: Source) -> None:
    """Fill a model that holds its base weights with what training changed.

    Every trained tensor of the loaded parts must be there once, and nothing unknown.

    Raises:
        CheckpointError: A file is missing or damaged, or the tensors are not the model's.
    """
    parameters = trained_parameters(model)
    absent: tuple[str, ...] = ()
    if model.compressor is None:
        absent += ("compressor.", *COMPRESSOR_WEIGHTS)
    if model.decoder is None:
        absent += ("decoder.", *DECODER_WEIGHTS)

    def is_wanted(name: str) -> bool:
        return plain_name(name) in parameters or not name.startswith(absent)

    stored = {tensor.name: tensor for tensor in source.tensors(is_wanted)}
    names = {plain_name(name) for name in stored}
    if names != set(parameters):
        unknown = {
            f"{plain_name(name)} ({tensor.file.name})"
            for name, tensor in stored.items()
            if plain_name(name) not in parameters
        }
        raise CheckpointError(
            f"The weights in {source.folder} are not those of its {_CONFIG}. "
            f"Missing: {_some(set(parameters) - names)}. Unknown: {_some(unknown)}. "
            "Restore the folder, or fix its config.json."
        )
    try:
        base = {name: parameters[name].detach() for name in names}
        trained = restore({name: tensor.values for name, tensor in stored.items()}, base)
    except (KeyError, IndexError, RuntimeError) as error:
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


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown or "none"
