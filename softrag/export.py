"""The decoder alone, adapters merged, as a plain Hugging Face checkpoint that any engine serves.

Nothing is written before the adapters are seen to change the weights, and nothing is left behind
unless the written files give the logits of the model with its adapters.
"""

from __future__ import annotations

import json
import tempfile
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from softrag.adapters import is_adapted, is_lora_weight, merged_weight
from softrag.base_models import build_once, cache_folder, quiet_loading
from softrag.checkpoint import locate, read_config
from softrag.errors import CheckpointError
from softrag.model import SoftRAGModel
from softrag.prompt import RagPrompt

SERVED_PREFIX = "softrag-decoder-"
"""Begins the names that `served_name` gives."""

# Relative error of logits that rounding alone explains. In half precision the merged sum is rounded
# once more than base and adapter apart.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_TOLERANCE = 0.05
_PROBE = "The 12 documents above were found by a search. Who wrote them, and when?"


def export_decoder(
    model: SoftRAGModel, folder: str | Path, *, dtype: torch.dtype | None = None
) -> Path:
    """Write the merged decoder with tokenizer and generation config to a folder.

    The folder is a plain checkpoint: `AutoModelForCausalLM.from_pretrained`, vLLM and others load
    it without softrag. What stands for memories in prompts is not part of it, unless the decoder
    has embeddings for it: an engine is given soft tokens as prompt embeddings.

    Args:
        model: Loaded with its decoder; adapters may be merged already.
        folder: Created when missing; the files of an older export are replaced.
        dtype: Of the written weights; None: as loaded.

    Returns:
        The folder.

    Raises:
        CheckpointError: The adapters change no weight, or the written checkpoint does not give the
            decoder's logits. Nothing is left in the folder then.
    """
    decoder, tokenizer = model.decoder, model.decoder_tokenizer
    if decoder is None or tokenizer is None:
        raise ValueError("The decoder was not loaded; use load_decoder=True.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or decoder.get_input_embeddings().weight.dtype
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as name:
        part = Path(name)
        save_torch_state_dict(_merged_state(decoder, dtype), part, max_shard_size="5GB")
        config = type(decoder.config).from_dict(decoder.config.to_dict())
        config.architectures = [type(decoder).__name__]
        config.dtype = dtype
        config.save_pretrained(part)
        _save_generation_config(decoder, RagPrompt.from_config(model.config, tokenizer), part)
        _save_tokenizer(tokenizer, part, rows=decoder.get_input_embeddings().weight.shape[0])
        _check_logits(decoder, part, tokenizer, dtype)
        for old in folder.glob("model*.safetensors*"):
            old.unlink()
        for item in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):
            item.chmod(0o644)  # The writer's own mode hides weights from other users.
            item.replace(folder / item.name)
    return folder


def cached_export(
    checkpoint: str | Path, *, dtype: torch.dtype, base_model: str | Path | None = None
) -> Path:
    """Export a checkpoint's decoder once into softrag's cache folder, and return where it is.

    Args:
        checkpoint: A folder or hub name, as `SoftRAGModel.from_pretrained` takes it.
        dtype: Of the written weights.
        base_model: Where the checkpoint's base model is, if not where the checkpoint says.

    Raises:
        CheckpointError: As `export_decoder`, or the checkpoint can't be loaded.
    """
    source = locate(checkpoint)
    digest = blake2b(f"{base_model} {dtype}".encode(), digest_size=8)
    for file in [source / "config.json", *sorted(source.glob("*.safetensors"))]:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)

    def export(folder: Path) -> None:
        model = SoftRAGModel.from_pretrained(
            source, base_model=base_model, load_compressor=False, dtype=dtype, device="cpu"
        )
        export_decoder(model, folder, dtype=dtype)

    return build_once(cache_folder() / f"decoder-{digest.hexdigest()}", export)


def served_name(checkpoint: str | Path) -> str:
    """Return a name to serve a checkpoint's exported decoder by, of what was trained in it.

    A client that knows the checkpoint then notices when it asks another one's decoder.
    """
    source = locate(checkpoint)
    values = read_config(source).decoder_config
    digest = blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8)
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                if name.startswith("decoder."):
                    digest.update(name.encode())
                    raw = tensors.get_tensor(name).contiguous().flatten().view(torch.uint8)
                    digest.update(raw.numpy().tobytes())
    return f"{SERVED_PREFIX}{digest.hexdigest()}"


def _merged_state(decoder: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """Return the decoder's weights on the CPU, adapters added, under the names of a plain model.

    Raises:
        CheckpointError: There are adapters, and adding them changed nothing.
    """
    adapted = {name: layer for name, layer in decoder.named_modules() if is_adapted(layer)}
    state: dict[str, torch.Tensor] = {}
    changed = 0
    for name, tensor in decoder.state_dict().items():
        if is_lora_weight(name):
            continue
        layer_name, is_base, kind = name.partition(".base_layer.")
        if is_base and kind == "weight":
            merged = merged_weight(adapted[layer_name])
            changed += not torch.equal(merged, tensor)
            tensor = merged
        state[f"{layer_name}.{kind}" if is_base else name] = tensor.to("cpu", dtype)
    if adapted and not changed:
        raise CheckpointError(
            f"Merging {len(adapted)} adapted layers of the decoder changed no weight: the adapters "
            "are empty. Load a trained checkpoint, or train this one first."
        )
    if decoder.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def _save_generation_config(decoder: Any, prompt: RagPrompt, folder: Path) -> None:  # noqa: ANN401
    """Save how the base model generates, greedy, ended by what the prompt's answers end with."""
    base = decoder.generation_config
    ends = base.eos_token_id
    ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    GenerationConfig(
        bos_token_id=base.bos_token_id,
        eos_token_id=sorted(ends | prompt.end_ids),
        pad_token_id=base.pad_token_id,
        do_sample=False,
    ).save_pretrained(folder)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, *, rows: int) -> None:
    """Save a tokenizer without the tokens that the decoder has no embedding for."""
    tokenizer.save_pretrained(folder)
    beyond = {token for token, id_ in tokenizer.get_added_vocab().items() if id_ >= rows}
    if not beyond:
        return
    path = folder / "tokenizer.json"
    backend = json.loads(path.read_text(encoding="utf-8"))
    backend["added_tokens"] = [t for t in backend["added_tokens"] if t["content"] not in beyond]
    path.write_text(json.dumps(backend, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(settings.get(name), list):
            settings[name] = [token for token in settings[name] if token not in beyond]
    listed = settings.get("added_tokens_decoder", {})
    for id_ in [id_ for id_, token in listed.items() if token["content"] in beyond]:
        del listed[id_]
    path.write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")


@torch.no_grad()
def _check_logits(
    decoder: Any,  # noqa: ANN401 - a decoder-only PreTrainedModel
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> None:
    """Load what was written and compare its logits with the decoder's.

    Raises:
        CheckpointError: They differ by more than rounding.
    """
    with quiet_loading():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    plain.to(decoder.device).eval()
    ids = torch.tensor([tokenizer.encode(_PROBE)], device=decoder.device)
    expected = decoder(input_ids=ids).logits.float()
    found = plain(input_ids=ids).logits.float()
    error = ((found - expected).norm() / expected.norm()).item()
    computed = {dtype, decoder.get_input_embeddings().weight.dtype}
    allowed = max(_TOLERANCE.get(each, _HALF_TOLERANCE) for each in computed)
    if not error <= allowed:  # NaN is no agreement either.
        raise CheckpointError(
            f"The merged decoder's logits differ from the adapted one's by {error:.2%}; rounding "
            f"explains {allowed:.2%}. Load the model in another dtype, or report this base model."
        )
