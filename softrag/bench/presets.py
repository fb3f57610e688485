"""Models of the shapes of released ones with random weights: speed needs no download."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from softrag.config import SoftRAGConfig
from softrag.model import SoftRAGModel
from softrag.prompt import add_special_tokens

_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "rms_norm_eps": 1e-6,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _QWEN3
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": _QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "llama",
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
"""Shapes of base models by name."""

PRESETS = {
    "qwen3-0.6b": ("qwen3-0.6b", "qwen3-0.6b"),
    "qwen3-8b": ("qwen3-8b", "qwen3-0.6b"),
    "mistral-7b": ("mistral-7b", "qwen3-0.6b"),
    "tiny": ("tiny", "tiny"),
}
"""Decoder and compressor shapes by name."""

WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from "
    "river mountain city king letter music history science water bridge island winter summer war "
    "peace book author player team school church castle road railway ship 1848 1912 1969 12 7"
).split()

TEMPLATE = (
    "{%- for message in messages -%}<turn> {{ message['content'] }} {% endfor -%}"
    "{%- if add_generation_prompt -%}<turn> {% endif -%}"
)


def build_model(
    preset: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    load_decoder: bool = True,
) -> SoftRAGModel:
    """Build a model of a preset's shape with random weights, its decoder with adapters.

    Args:
        preset: A key of `PRESETS`.
        device: Where it is built.
        dtype: Of all weights.
        seed: Of the weights.
        load_decoder: False leaves the decoder out.
    """
    if preset not in PRESETS:
        raise ValueError(f"Found preset {preset!r}; expected one of {', '.join(PRESETS)}.")
    decoder_shape, compressor_shape = (SHAPES[name] for name in PRESETS[preset])
    config = SoftRAGConfig(
        decoder=preset,
        compressor=preset,
        decoder_config=decoder_shape,
        compressor_config=compressor_shape,
        decoder_lora={"r": 16, "alpha": 32} if load_decoder else None,
        fingerprint="0" * 32,
    )
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            decoder = (
                AutoModelForCausalLM.from_config(_shape(decoder_shape)) if load_decoder else None
            )
            compressor = AutoModel.from_config(_shape(compressor_shape))
            model = SoftRAGModel(config, decoder, compressor, load_decoder=load_decoder)
    finally:
        torch.set_default_dtype(default)
    model.decoder_tokenizer = build_tokenizer(decoder_shape["vocab_size"])
    model.compressor_tokenizer = build_tokenizer(compressor_shape["vocab_size"])
    # Hashing gigabytes of random weights would tell nothing.
    model.fingerprint = "0" * 32
    model.to(device, dtype)  # type: ignore[arg-type]
    return model.eval()


def random_texts(
    tokenizer: PreTrainedTokenizerBase, count: int, lengths: int | Sequence[int], *, seed: int = 0
) -> list[str]:
    """Return texts of so many tokens each; exactly so for a preset's tokenizer.

    Args:
        tokenizer: Whose tokens count.
        count: Of texts.
        lengths: One length for all, or lengths to draw from.
        seed: Of words and lengths.
    """
    chance = random.Random(seed)
    sizes = [lengths] * count if isinstance(lengths, int) else chance.choices(lengths, k=count)
    if "w0" in tokenizer.get_vocab():
        return [" ".join(f"w{chance.randrange(900)}" for _ in range(size)) for size in sizes]
    texts = []
    for size in sizes:
        words = " ".join(chance.choices(WORDS, k=size))
        ids = tokenizer.encode(words, add_special_tokens=False)[:size]
        texts.append(str(tokenizer.decode(ids)))
    return texts


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per word `w0`, `w1`, …, and an end nobody writes."""
    words = {"<turn>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(vocab_size - 2)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    # Behind the vocabulary: a random model can't choose it, so that every answer has full length.
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.chat_template = TEMPLATE
    add_special_tokens(tokenizer)
    return tokenizer


def _shape(values: dict[str, Any]) -> Any:  # noqa: ANN401 - any family's config
    values = dict(values)
    return AutoConfig.for_model(values.pop("model_type"), **values)
