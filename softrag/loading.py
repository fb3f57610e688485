"""Models from base language models, ready to be trained, and from checkpoints, as trained.

What `SoftRAGModel.from_base` and `SoftRAGModel.from_pretrained` do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from softrag import checkpoint
from softrag.backbones import choose_dtypes, empty_compressor, load_base, load_tokenizer
from softrag.base_models import quiet_loading, resolve_base_model, shape_of
from softrag.config import SoftRAGConfig
from softrag.connector import Connector, StandardizedConnector
from softrag.errors import CheckpointError
from softrag.fingerprint import check_fingerprint, fingerprint_at_rate
from softrag.packing import pack
from softrag.prompt import add_rerank_token

if TYPE_CHECKING:
    from softrag.model import SoftRAGModel


def start(
    kind: type[SoftRAGModel],
    config: SoftRAGConfig,
    *,
    dtype: torch.dtype,
    frozen_dtype: torch.dtype,
    seed: int,
) -> SoftRAGModel:
    """Start a new model from the base language models that `config` names."""
    if config.decoder is None or config.compressor is None:
        raise ValueError(
            f"from_base needs both base models; got decoder={config.decoder!r} and "
            f"compressor={config.compressor!r}."
        )
    decoder_path = resolve_base_model(config.decoder)
    with quiet_loading():
        decoder = AutoModelForCausalLM.from_pretrained(decoder_path, dtype=frozen_dtype)
    config.decoder_config = shape_of(decoder.config)
    compressor_path, compressor = decoder_path, None
    if not config.shares_backbone:
        compressor_path = resolve_base_model(config.compressor)
        kept = frozen_dtype if config.compressor_lora is not None else dtype
        with quiet_loading():
            compressor = AutoModel.from_pretrained(compressor_path, dtype=kept)
        config.compressor_config = shape_of(compressor.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config, decoder, compressor)
        model.compressor_tokenizer = load_tokenizer(compressor_path, config)
        if config.rerank:
            add_rerank_token(model.compressor_tokenizer)
        model.decoder_tokenizer = load_tokenizer(decoder_path, config)
        _initialise_new_weights(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def _initialise_new_weights(model: SoftRAGModel) -> None:
    assert model.compressor is not None
    assert model.decoder is not None
    # The mean embedding is in-distribution for every base model; zeros are not.
    words = model.compressor.get_input_embeddings().weight.float()
    model.memory_embedding.copy_(words.mean(0))
    if model.config.rerank:
        model.rerank_embedding.copy_(words.mean(0))
    embeddings = model.decoder.get_input_embeddings().weight.float()
    model.auto_encoding_embedding.copy_(embeddings.mean(0))
    if model.config.adds_words:
        # Two models of one family share their words' embeddings; others learn from nothing.
        same = words.shape == embeddings.shape and torch.equal(words, embeddings)
        initialise = nn.init.eye_ if same else nn.init.zeros_
        initialise(model.word_projection.weight)
    if isinstance(model.connector, nn.Identity):
        return
    # Random documents are enough to find the size of the compressor's states.
    ids = torch.randint(0, len(words), (8, 64), device=words.device)
    ids = torch.cat([ids, ids.new_full((8, 4), model.memory_ids[0])], dim=1)
    flat, packed = ids.flatten(), pack(torch.ones_like(ids))
    rms = embeddings.pow(2).mean().sqrt()
    if isinstance(model.connector, StandardizedConnector):
        model.connector.gain.fill_(rms)
        model.calibrate_connector(flat, packed)
    elif isinstance(model.connector, Connector):
        # Beside the words' own embeddings the rest starts small.
        share = 0.3 if model.config.adds_words else 1.0
        memory = model.read_documents(flat, packed).memory
        model.connector.match_scale(memory.to(model.connector.up.weight.dtype), share * rms.item())


def load(
    kind: type[SoftRAGModel],
    source: checkpoint.Source,
    *,
    load_decoder: bool,
    load_compressor: bool,
    dtype: torch.dtype | str,
    device: torch.device,
    rate: int | None,
) -> SoftRAGModel:
    """Load a trained model; arguments and errors as in `SoftRAGModel.from_pretrained`."""
    config = source.config
    if rate is not None:
        _check_rate(config, rate, source.folder)
    decoder_dtype, compressor_dtype = choose_dtypes(config, dtype, device)
    decoder = compressor = None
    if load_decoder or config.shares_backbone:
        decoder = load_base(AutoModelForCausalLM, source, "decoder", decoder_dtype, device)
    if load_compressor and not config.shares_backbone and not config.stores_compressor:
        # In float32 first: stored differences are added to the base weights before rounding.
        compressor = load_base(AutoModel, source, "compressor", torch.float32, torch.device("cpu"))
    try:
        if load_compressor and config.stores_compressor:
            compressor = empty_compressor(config, compressor_dtype, device)
        with no_init_weights():  # Whatever is built here is filled below.
            model = kind(
                config,
                decoder,
                compressor,
                load_decoder=load_decoder,
                load_compressor=load_compressor,
            )
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source.folder / 'config.json'} describes a model that can't be built: {error}"
        ) from error
    model.compressor_tokenizer = source.compressor_tokenizer
    model.decoder_tokenizer = source.decoder_tokenizer
    checkpoint.load_weights(model, source)
    if model.compressor is not None:
        # What decides a memory's values is hashed before any rounding to the target's dtype.
        check_fingerprint(model, source.folder)
        model.compressor.to(compressor_dtype)
        model.connector.to(compressor_dtype)
        if config.adds_words:
            model.word_projection.to(compressor_dtype)
        # A rerank head stays in float32, to tell like documents apart.
        model.memory_embedding.data = model.memory_embedding.data.to(compressor_dtype)
    if model.decoder is not None:
        model.decoder.to(decoder_dtype)
        added = model.auto_encoding_embedding
        added.data = added.data.to(decoder_dtype)
    model.to(device)  # type: ignore[arg-type]
    if rate is not None and rate != config.rate:
        model.fingerprint = fingerprint_at_rate(model.fingerprint, rate)
        config.rate = rate
    return model.eval()


def _check_rate(config: SoftRAGConfig, rate: int, folder: Path) -> None:
    trained_at = config.rates or [config.rate]
    if rate in trained_at and config.memory_tokens is None:
        return
    raise ValueError(
        f"rate {rate} was asked for, but {folder} was trained "
        + (
            f"at {', '.join(map(str, trained_at))} document tokens per soft token. Use one of "
            "them, or train with data.rates."
            if config.memory_tokens is None
            else f"for {config.memory_tokens} soft tokens, whatever the document's length."
        )
    )
