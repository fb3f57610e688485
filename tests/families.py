"""Tiny random models with real tokenizers, one per family of base models that softrag reads.

Each folder holds what `save_pretrained` writes for a released model of that family: weights,
config, generation config, a byte-level tokenizer with the family's own special tokens, and a chat
template of the family's shape. The differences that break code written for one family are kept
on purpose:

* Llama    the template writes bos itself; no pad token; two tokens end a turn
* Qwen3    no bos; `<think>` block unless told otherwise; the head has rows no token uses; NFC
* Mistral  the template refuses a system turn; no pad token
* Gemma3   the system turn is folded into the user's; embeddings are scaled inside the layer;
           sliding attention; eos does not end a turn, `<end_of_turn>` does
* Qwen2    the template invents a system turn when there is none; biases in attention
"""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SENTENCES = [
    "Background: the documents below were found by a search, and the question is about them.",
    "Paris is the capital of France, and the Seine runs through it.",
    "William Shakespeare wrote Hamlet, Macbeth and King Lear between 1599 and 1606.",
    "Water boils at 100 degrees Celsius at sea level; on a mountain it boils earlier.",
    "Question: who discovered penicillin? Answer: Alexander Fleming, in London, in 1928.",
    "The Amazon is the largest river in the world by the volume of water it carries.",
    "You are a helpful assistant. Answer the question as briefly as possible.",
    "What is the name of the author, and when was the book first published?",
]
# As in GPT-4's tokenizer, which Llama 3 and Qwen follow; they differ in the run of digits.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LLAMA_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

# As in Qwen3: an answer in the history carries no thoughts, the last one always has the block,
# and `enable_thinking=False` opens the turn with an empty block.
QWEN3_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' and loop.last -%}
{{- '<think>\\n' + (message['reasoning_content'] | default('')) + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""

QWEN2_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# As in Mistral-7B-Instruct: a system turn breaks the alternation, and that is what is reported.
MISTRAL_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{- '[INST] ' + message['content'] + ' [/INST]' -}}
{%- else -%}
{{- ' ' + message['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""

GEMMA3_TEMPLATE = """\
{{- bos_token -}}
{%- set system = '' -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] + '\\n\\n' -%}
{%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{- '<start_of_turn>' + role + '\\n' + (system if loop.first else '') -}}
{{- message['content'] | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What makes a family itself.

    Attributes:
        config: Class of the config.
        model: Class of the causal language model.
        template: The chat template.
        digits: How a run of digits is split, as the end of a regular expression.
        first: Special tokens at the start of the vocabulary.
        last: Special tokens behind the learned vocabulary.
        plain: Added tokens behind those, which decoding keeps (Qwen3's `<think>`).
        bos: Written by the tokenizer before every text, and by the template; None where neither.
        eos: The tokenizer's.
        pad: The tokenizer's; None where the released tokenizers have none.
        ends: What `generate` stops at; the first of them ends a turn of the template.
        unused_rows: Rows of the embedding that no token uses.
        options: Of the config.
    """

    config: type[PretrainedConfig]
    model: type[PreTrainedModel]
    template: str
    digits: str
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    bos: str | None = None
    eos: str
    pad: str | None = None
    ends: tuple[str, ...]
    unused_rows: int = 0
    normalizer: Callable[[], normalizers.Normalizer] | None = None
    options: dict[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "Llama": Family(
        config=LlamaConfig,
        model=LlamaForCausalLM,
        template=LLAMA_TEMPLATE,
        digits="{1,3}",
        last=(
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        ends=("<|eot_id|>", "<|end_of_text|>"),
        options={"tie_word_embeddings": False},
    ),
    "Qwen3": Family(
        config=Qwen3Config,
        model=Qwen3ForCausalLM,
        template=QWEN3_TEMPLATE,
        digits="",
        last=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        plain=("<think>", "</think>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        ends=("<|im_end|>", "<|endoftext|>"),
        unused_rows=27,
        normalizer=normalizers.NFC,
        # Heads wider than hidden / heads, as in the small Qwen3 models.
        options={"tie_word_embeddings": True, "head_dim": 16},
    ),
    "Mistral": Family(
        config=MistralConfig,
        model=MistralForCausalLM,
        template=MISTRAL_TEMPLATE,
        digits="",
        first=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
        ends=("</s>",),
        options={"tie_word_embeddings": False, "sliding_window": None},
    ),
    "Gemma3": Family(
        config=Gemma3TextConfig,
        model=Gemma3ForCausalLM,
        template=GEMMA3_TEMPLATE,
        digits="",
        first=("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        ends=("<end_of_turn>", "<eos>"),
        options={
            "tie_word_embeddings": True,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            # Shorter than any prompt, so that the window matters.
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "Qwen2": Family(
        config=Qwen2Config,
        model=Qwen2ForCausalLM,
        template=QWEN2_TEMPLATE,
        digits="",
        last=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        ends=("<|im_end|>", "<|endoftext|>"),
        unused_rows=13,
        normalizer=normalizers.NFC,
        options={"tie_word_embeddings": True},
    ),
}


def build_family(
    name: str,
    folder: str | Path | None = None,
    *,
    hidden_size: int = 32,
    layers: int = 2,
    seed: int = 0,
) -> Path:
    """Save a tiny random model of a family and its tokenizer, as `save_pretrained` does.

    Args:
        name: A key of `FAMILIES`.
        folder: Where to save; None for a temporary folder that lives as long as the process and
            is shared by equal calls.
        hidden_size: Width of the model; a multiple of 8.
        layers: Depth of the model.
        seed: Of the weights.

    Returns:
        The folder, named after the family unless `folder` says otherwise.
    """
    if folder is None:
        return _shared_family(name, hidden_size, layers, seed)
    family = FAMILIES[name]
    tokenizer = build_tokenizer(name)
    ends = tokenizer.convert_tokens_to_ids(list(family.ends))
    vocab_size = len(tokenizer) + family.unused_rows
    options = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "vocab_size": vocab_size,
        # Wide enough that greedy choices are no near ties.
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": tokenizer.pad_token_id,
        **family.options,
    }
    if "layer_types" in options:
        types = options["layer_types"]
        options["layer_types"] = [types[layer % len(types)] for layer in range(layers)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = family.model(family.config(**options))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def build_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Train the byte-level tokenizer of a family on `SENTENCES`."""
    family = FAMILIES[name]
    backend = Tokenizer(models.BPE())
    if family.normalizer is not None:
        backend.normalizer = family.normalizer()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT % family.digits), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=list(family.first),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    backend.add_special_tokens(list(family.last))
    backend.add_tokens(list(family.plain))
    if family.bos is not None:
        backend.post_processor = TemplateProcessing(
            single=f"{family.bos} $A",
            pair=f"{family.bos} $A {family.bos} $B",
            special_tokens=[(family.bos, backend.token_to_id(family.bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        unk_token="<unk>" if "<unk>" in family.first else None,
        chat_template=family.template,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


@cache
def _shared_family(name: str, hidden_size: int, layers: int, seed: int) -> Path:
    parent = tempfile.TemporaryDirectory(prefix="softrag-family-")
    atexit.register(parent.cleanup)
    return build_family(
        name, Path(parent.name) / name, hidden_size=hidden_size, layers=layers, seed=seed
    )
