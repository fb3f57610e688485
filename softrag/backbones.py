"""Base language models as parts of a softrag model: loaded, shared, cut, adapted."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from softrag import checkpoint
from softrag.adapters import add_lora
from softrag.base_models import fast_dtype, quiet_loading, resolve_base_model
from softrag.config import SoftRAGConfig
from softrag.layouts import base_model_error
from softrag.packing import PACKED_ATTENTION, can_pack
from softrag.prompt import add_special_tokens

logger = logging.getLogger(__name__)

# A decoder-only PreTrainedModel. Its published types know neither layers nor embeddings.
LanguageModel = Any

DTYPES = ("float32", "bfloat16", "float16")
"""What weights may be loaded in, by torch's names."""


def build_decoder(config: SoftRAGConfig, decoder: LanguageModel | None) -> LanguageModel:
    """Make a base model, or one with random weights where none is given, the config's decoder."""
    if decoder is None:
        decoder = AutoModelForCausalLM.from_config(config.sub_config("decoder"))
    give_vocabulary(decoder, config.decoder_vocabulary)
    return decoder


def build_compressor(
    config: SoftRAGConfig, compressor: LanguageModel | None, decoder: LanguageModel | None
) -> LanguageModel:
    """Make a base model, or the decoder's own or one with random weights, the compressor."""
    if compressor is None:
        compressor = (
            share_backbone(decoder)
            if config.shares_backbone and decoder is not None
            else AutoModel.from_config(config.sub_config("compressor"))
        )
    if not config.shares_backbone:
        give_vocabulary(compressor, config.compressor_vocabulary)
    if config.compressor_layers is not None:
        keep_layers(compressor, config.compressor_layers)
    if not config.compressor_norm:
        compressor.norm = nn.Identity()
    return compressor


def read_without_padding(model: LanguageModel) -> None:
    """Let a model read packed rows, if its attention can."""
    backbone = model.base_model
    if can_pack(backbone):
        model.set_attn_implementation(PACKED_ATTENTION)
    else:
        logger.info("%s can't be packed; batches are padded", type(backbone).__name__)


def freeze_and_adapt(
    config: SoftRAGConfig, decoder: LanguageModel | None, compressor: LanguageModel | None
) -> None:
    """Freeze the base vocabulary and what adapters stand in for; add the adapters."""
    if decoder is not None:
        # The base weights never change: with adapters they are learned beside them,
        # without, the decoder is frozen.
        decoder.requires_grad_(False)
        if config.decoder_lora is not None:
            add_lora(decoder.base_model, **config.decoder_lora)
    if compressor is not None:
        if config.compressor_lora is not None:
            compressor.requires_grad_(False)
            add_lora(compressor, **config.compressor_lora)
        elif config.shares_backbone:
            raise ValueError(
                "A compressor that shares the decoder's backbone learns through adapters: "
                "set compressor_lora."
            )
        compressor.get_input_embeddings().requires_grad_(False)


def give_vocabulary(model: LanguageModel, rows: int | None) -> None:
    """Give a model room for the embeddings that the checkpoint brings."""
    if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
        with quiet_loading():
            model.resize_token_embeddings(rows, mean_resizing=False)


def embeddings_name(model: LanguageModel) -> str:
    """Return the name of the input embeddings' parameter."""
    embeddings = model.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is embeddings)


def share_backbone(decoder: LanguageModel) -> LanguageModel:
    """Return a second module tree over the decoder's own weights, to carry other adapters."""
    backbone = decoder.base_model
    return copy.deepcopy(backbone, {id(p): p for p in backbone.parameters()})


def keep_layers(model: LanguageModel, layers: int) -> None:
    """Drop all but the first layers of a backbone."""
    available = len(model.layers)
    if not 1 <= layers <= available:
        raise ValueError(f"compressor_layers is {layers}; the compressor has {available} layers.")
    model.layers = model.layers[:layers]
    # In place: the layers hold this very object, and ask it which attention to use.
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]


def empty_compressor(
    config: SoftRAGConfig, dtype: torch.dtype, device: torch.device
) -> LanguageModel:
    """Make room, where it is needed, for a compressor that the checkpoint holds whole."""
    shape = config.sub_config("compressor")
    if config.compressor_layers is not None:
        shape.num_hidden_layers = config.compressor_layers
        if getattr(shape, "layer_types", None):
            shape.layer_types = shape.layer_types[: config.compressor_layers]
    # The fingerprint is of weights rounded to bfloat16 at most.
    kept = dtype if dtype in (torch.bfloat16, torch.float64) else torch.float32
    with device, no_init_weights():
        return AutoModel.from_config(shape, dtype=kept)


def load_base(
    kind: type[AutoModel] | type[AutoModelForCausalLM],
    source: checkpoint.Source,
    part: str,
    dtype: torch.dtype,
    device: torch.device,
) -> LanguageModel:
    """Load the base model of `"decoder"` or `"compressor"`, straight onto a device.

    Raises:
        CheckpointError: It is neither where the checkpoint says nor on a reachable hub.
    """
    name = str(getattr(source.config, part))
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    if device.type != "cpu":
        # Without a copy on the host: the files are mapped, and read into the device's memory.
        options["device_map"] = {"": device}
    if part == "decoder" and source.config.decoder_vocabulary is not None:
        # The checkpoint may bring a head of its own where the base model has none.
        options["tie_word_embeddings"] = source.config.sub_config(part).tie_word_embeddings
    try:
        with quiet_loading():
            return kind.from_pretrained(resolve_base_model(name), **options)
    except (OSError, ValueError) as error:
        raise base_model_error(source.folder, name, error) from error


def load_tokenizer(path: str, config: SoftRAGConfig) -> PreTrainedTokenizerBase:
    """Load a base model's tokenizer and add softrag's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    add_special_tokens(tokenizer, config)
    return tokenizer


def choose_device(device: torch.device | str | None) -> torch.device:
    """Return the device that was asked for, or the first GPU, else the CPU.

    Raises:
        ValueError: It is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (AssertionError, RuntimeError) as error:
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ValueError(
            f"Device {str(device)!r} cannot be used here. Choose one of {', '.join(there)}, or "
            "leave it out."
        ) from error
    return chosen


def choose_dtypes(
    config: SoftRAGConfig, dtype: torch.dtype | str, device: torch.device
) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of decoder and compressor."""
    if dtype in DTYPES:
        dtype = getattr(torch, str(dtype))
    if isinstance(dtype, torch.dtype):
        return dtype, dtype
    if dtype != "auto":
        names = ", ".join(DTYPES)
        raise ValueError(f"dtype is {dtype!r}; expected auto, {names}, or a torch.dtype.")
    if device.type != "cpu":
        return torch.bfloat16, torch.bfloat16
    # A backbone that is shared has one dtype, the decoder's.
    return torch.float32, torch.float32 if config.shares_backbone else fast_dtype(device)
