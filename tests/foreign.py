"""Checkpoints in other projects' layouts, and what their models compute.

Written from the layouts' descriptions with transformers, peft and tokenizers alone: nothing of
softrag is used, so that agreement with it means something.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from peft import LoraConfig
from tokenizers import AddedToken, Tokenizer
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tests.families import build_family

SYSTEM = (
    "You are a helpful assistant. Your task is to extract relevant information from provided "
    "documents and to answer to questions as briefly as possible."
)


class RawTokenizer:
    """A tokenizer.json as it is, with special tokens added; strings in, ids out."""

    def __init__(self, folder: Path, tokens: Sequence[str]) -> None:
        self.backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.backend.add_special_tokens([AddedToken(t, special=True) for t in tokens])
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        self.bos, self.eos = settings.get("bos_token"), settings["eos_token"]
        self.chat = AutoTokenizer.from_pretrained(folder)

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def id(self, token: str) -> int:
        return self.backend.token_to_id(token)

    def render(self, system: str, user: str) -> str:
        """Apply the chat template; where it has no system role, one user turn says both."""
        turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        try:
            return self.chat.apply_chat_template(turns, **options)
        except TemplateError:
            folded = [{"role": "user", "content": f"{system}\n{user}"}]
            return self.chat.apply_chat_template(folded, **options)


@dataclass
class Foreign:
    """A checkpoint on disk, and its model in memory.

    Attributes:
        folder: The checkpoint.
        base: The base model.
        tokenizer: The decoder's.
        decoder: With its adapters.
        memory: Names of a document's memory tokens, in order.
        compressor_tokenizer: None where it is the decoder's.
        compressor: None where it is the decoder with another adapter.
        connector: None where there is none.
        max_tokens: Longest document.
        question: What documents are compressed for.
    """

    folder: Path
    base: Path
    tokenizer: RawTokenizer
    decoder: Any
    memory: list[str]
    max_tokens: int
    compressor_tokenizer: RawTokenizer | None = None
    compressor: Any = None
    connector: nn.Module | None = None
    question: str | None = None
    adapters: tuple[str, ...] = ("decoder_adapter", "encoder_adapter")
    config: dict[str, Any] = field(default_factory=dict)

    def document_ids(self, document: str) -> list[int]:
        """What the compressor reads, without padding."""
        asked = "" if self.question is None else f"\nQuery:\n{self.question}Document:\n"
        if self.compressor is None:
            t = self.tokenizer
            bos = t.bos or "<|im_start|>"
            ids = t.ids(f"<ENC>{bos}{asked}{document}{t.eos}")
            limit = self.max_tokens + 3 if self.question is None else self.max_tokens + 64 + 8
        else:
            t = self.compressor_tokenizer
            ids = t.ids(asked + document, add_special_tokens=True)
            limit = self.max_tokens + 3 if self.question is None else self.max_tokens + 64 + 8
        return ids[:limit] + [t.id(name) for name in self.memory]

    @torch.no_grad()
    def compress(self, documents: Sequence[str]) -> torch.Tensor:
        """Return `(documents, memory, hidden)`."""
        rows = [self.document_ids(document) for document in documents]
        width = max(map(len, rows)) + 5  # Padded on the left, and to more than the longest.
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        model = self.compressor
        if model is None:
            model = self.decoder
            model.set_adapter(self.adapters[1])
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        states = output.hidden_states[-1][:, width - len(self.memory) :]
        return states if self.connector is None else self.connector(states)

    def prompt_ids(self, question: str, documents: int) -> list[int]:
        """What the decoder reads."""
        one = "".join(self.memory) + "<SEP>"
        user = f"Background:\n{one * documents}\n\nQuestion:{question}"
        return self.tokenizer.ids(self.tokenizer.render(SYSTEM, user))

    @torch.no_grad()
    def logits(self, question: str, soft_tokens: torch.Tensor) -> torch.Tensor:
        """Return `(tokens, vocabulary)` for soft tokens `(documents, memory, hidden)`."""
        ids = torch.tensor(self.prompt_ids(question, len(soft_tokens)))
        self.decoder.set_adapter(self.adapters[0])
        embeddings = self.decoder.get_input_embeddings()(ids).clone()
        first = (ids == self.tokenizer.id(self.memory[0])).nonzero()[0, 0]
        n = len(self.memory)
        for j, document in enumerate(soft_tokens):
            start = first + j * (n + 1)
            embeddings[start : start + n] = document
        return self.decoder(inputs_embeds=embeddings[None]).logits[0]


def build_hub(
    folder: Path,
    base: str | Path = "Llama",
    *,
    seed: int = 0,
    compressor: str | Path | None = None,
    trimmed: int | None = None,
    norm: bool = False,
    lora_compressor: bool = False,
    connector_hidden: int | None = 12,
    question: str | None = None,
    **changes: Any,
) -> Foreign:
    """Write a checkpoint as PISCO, CLaRa and (with a compressor) OSCAR's family are published.

    Args:
        folder: Where to.
        base: Family or folder of the decoder's base model.
        seed: Of everything trained.
        compressor: Family or folder of the compressor's base model.
        trimmed: Keep only so many layers of it ("mistral_trimmed").
        norm: Whether a trimmed compressor keeps its last norm.
        lora_compressor: Train adapters of the compressor only.
        connector_hidden: Width of the connector; None for none.
        question: What documents are compressed for.
        changes: Of config.json.
    """
    base = build_family(base) if isinstance(base, str) else base
    values: dict[str, Any] = {
        "model_type": "COCOM",
        "architectures": ["COCOM"],
        "auto_map": {"AutoModel": "modelling_pisco.COCOM"},
        "decoder_model_name": str(base),
        "doc_max_length": 32,
        "compr_rate": 8,
        "compr_model_name": None,
        "sep": True,
        "lora": True,
        "lora_r": 4,
        "training_form": "both_separately",
        "optimize_mem_tokens": True,
        "different_mem_tokens": True,
        "attn_implementation": "flash_attention_2",
        "quantization": "no",
    } | changes
    n = values["doc_max_length"] // values["compr_rate"]
    distinct = [f"<MEM{i}>" for i in range(n)] if values["different_mem_tokens"] else ["<MEM>"]
    memory = distinct if len(distinct) == n else distinct * n
    tokens = [*distinct, "<AE>", "<ENC>", "<SEP>"]
    tokens += ["<KBTC>"] if values.get("kbtc_training") else []
    tokenizer = RawTokenizer(base, tokens)
    generator = torch.Generator().manual_seed(seed)
    decoder = _resized(AutoModelForCausalLM, base, len(tokenizer))
    adapters = ["decoder_adapter"] + ([] if compressor else ["encoder_adapter"])
    if values["model_type"] == "CLaRa":
        adapters.append("query_reasoner_adapter")
    for adapter in adapters:
        _adapt(decoder, adapter, values["lora_r"])
    _shake(decoder, generator)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({a: _adapter(decoder, a) for a in adapters}, folder / "adapters.pth")
    ends = {"model.embed_tokens.weight": decoder.get_input_embeddings().weight.data}
    if not decoder.config.tie_word_embeddings:
        ends["lm_head.weight"] = decoder.get_output_embeddings().weight.data
    torch.save(ends, folder / "decoder_first_last_layers.pth")
    foreign = Foreign(
        folder, base, tokenizer, decoder, memory, values["doc_max_length"], question=question
    )
    if question is not None and compressor is None:
        values["query_dependent"] = True
    if compressor is not None:
        place = build_family(compressor) if isinstance(compressor, str) else compressor
        values["compr_model_name"] = "mistral_trimmed" if trimmed else str(place)
        if trimmed:
            values |= {
                "compr_base_model_name": str(place),
                "compr_n_layers": trimmed,
                "compr_rms_norm": norm,
            }
        values |= {
            "lora_compressor": lora_compressor,
            "lora_r_compressor": 3,
            "compr_use_mlp": connector_hidden is not None,
            "compr_mlp_hidden_dim": connector_hidden or 8096,
        }
        if question is None:
            values["query_dependent"] = False
        _build_compressor(foreign, place, distinct, values, generator)
    foreign.config = values
    (folder / "config.json").write_text(json.dumps(values))
    return foreign


def _build_compressor(
    foreign: Foreign,
    place: Path,
    distinct: list[str],
    values: dict[str, Any],
    generator: torch.Generator,
) -> None:
    tokenizer = RawTokenizer(place, distinct)
    compressor = _resized(AutoModel, place, len(tokenizer))
    trimmed = values["compr_model_name"] == "mistral_trimmed"
    if trimmed:
        compressor.layers = compressor.layers[: values["compr_n_layers"]]
        compressor.config.num_hidden_layers = values["compr_n_layers"]
        if not values["compr_rms_norm"]:
            compressor.norm = nn.Identity()
    inside = foreign.folder / "compressor"
    inside.mkdir(exist_ok=True)
    prefix = "custom_model." if trimmed else ""
    if values["lora_compressor"]:
        _adapt(compressor, "compr_adapter", values["lora_r_compressor"], task=None)
        _shake(compressor, generator)
        adapter = _adapter(compressor, "compr_adapter")
        torch.save({"compr_adapter": adapter}, inside / "compressor_adapters.pth")
        torch.save(
            {f"{prefix}embed_tokens.weight": compressor.get_input_embeddings().weight.data},
            inside / "first_layer.pth",
        )
    else:
        _shake(compressor, generator, everything=True)
        state = {prefix + name: tensor for name, tensor in compressor.state_dict().items()}
        torch.save(state, inside / "compressor.pth")
    hidden, wide = compressor.config.hidden_size, foreign.decoder.config.hidden_size
    if values["compr_use_mlp"]:
        width = values["compr_mlp_hidden_dim"]
        foreign.connector = nn.Sequential(
            nn.Linear(hidden, width), nn.ReLU(), nn.Linear(width, wide)
        )
        _shake(foreign.connector, generator, everything=True)
        torch.save(foreign.connector.state_dict(), inside / "mlp.pth")
    foreign.compressor_tokenizer, foreign.compressor = tokenizer, compressor.eval()


class Research(Foreign):
    """A checkpoint of the research code of 2026, and its model."""

    def document_ids(self, document: str) -> list[int]:
        text = document
        if self.question is not None:
            text = f"Query: {self.question}\n Document: {document}"
        ids = self.compressor_tokenizer.ids(text, add_special_tokens=True)[: self.max_tokens]
        n = len(ids) // self.config["compr_rate"] + 1
        return ids + [self.compressor_tokenizer.id("<MEM>")] * n

    @torch.no_grad()
    def compress_one(self, document: str) -> torch.Tensor:
        """Return `(memory, hidden)`."""
        ids = torch.tensor([self.document_ids(document)])
        states = self.compressor(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        return self.connector(states[ids == self.compressor_tokenizer.id("<MEM>")])

    def prompt_ids_for(self, question: str, lengths: Sequence[int]) -> list[int]:
        documents = "".join(f"Document {i}:{'<MEM>' * n}" for i, n in enumerate(lengths))
        user = f"\n\nBackground:{documents}\n Question: {question}"
        return self.tokenizer.ids(self.tokenizer.render(SYSTEM, user))

    @torch.no_grad()
    def logits_for(self, question: str, memories: Sequence[torch.Tensor]) -> torch.Tensor:
        ids = torch.tensor(self.prompt_ids_for(question, [len(memory) for memory in memories]))
        embeddings = self.decoder.get_input_embeddings()(ids).clone()
        embeddings[ids == self.tokenizer.id("<MEM>")] = torch.cat(list(memories))
        return self.decoder(inputs_embeds=embeddings[None]).logits[0]


def build_research(
    folder: Path,
    base: str = "Llama",
    compressor: str = "Qwen3",
    *,
    seed: int = 0,
    question: str | None = None,
    **changes: Any,
) -> Research:
    """Write a checkpoint as the research code of 2026 does."""
    base_folder, place = build_family(base), build_family(compressor)
    values: dict[str, Any] = {
        "model_type": "PISCO",
        "decoder_model_name": str(base_folder),
        "compressor_model_name": str(place),
        "compr_rate": 4,
        "compressor_mlp_hidden_dim": 12,
        "lora_decoder": True,
        "lora_r_decoder": 4,
        "attn_implementation": "flash_attention_2",
        "device_map": None,
        "load_decoder": True,
    } | changes
    if question is not None:
        values["query_dependent"] = True
    generator = torch.Generator().manual_seed(seed)
    tokenizer = RawTokenizer(base_folder, ["<MEM>", "<AE>"])
    compressor_tokenizer = RawTokenizer(place, ["<MEM>"])
    decoder = _resized(AutoModelForCausalLM, base_folder, len(tokenizer))
    _adapt(
        decoder, "default", values["lora_r_decoder"], modules_to_save=["embed_tokens", "lm_head"]
    )
    _shake(decoder, generator)
    whole = _resized(AutoModelForCausalLM, place, len(compressor_tokenizer))
    _shake(whole, generator, everything=True)
    connector = nn.Sequential(
        nn.Linear(whole.config.hidden_size, values["compressor_mlp_hidden_dim"]),
        nn.ReLU(),
        nn.Linear(values["compressor_mlp_hidden_dim"], decoder.config.hidden_size),
    )
    _shake(connector, generator, everything=True)
    folder.mkdir(parents=True, exist_ok=True)
    kept = ("embed_tokens", "lm_head", "lora", "adapter")
    state = {n: t for n, t in decoder.state_dict().items() if any(k in n for k in kept)}
    torch.save(state, folder / "decoder_state.pt")
    torch.save(connector.state_dict(), folder / "connector.pt")
    whole.save_pretrained(folder / "compressor")
    for part, at, tokens in (
        ("compressor", place, ["<MEM>"]),
        ("decoder", base_folder, ["<MEM>", "<AE>"]),
    ):
        saved = AutoTokenizer.from_pretrained(at)
        saved.add_special_tokens({"additional_special_tokens": tokens})
        if part == "decoder":
            saved.bos_token = saved.bos_token or ""
        saved.save_pretrained(folder / f"{part}_tokenizer")
    (folder / "config.json").write_text(json.dumps(values))
    return Research(
        folder,
        base_folder,
        tokenizer,
        decoder.eval(),
        ["<MEM>"],
        512,
        compressor_tokenizer,
        whole.eval(),
        connector,
        question,
        config=values,
    )


def _resized(kind: Any, place: Path, rows: int) -> Any:
    model = kind.from_pretrained(place, dtype=torch.float32)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model.eval()


def _adapt(
    model: Any, name: str, rank: int, *, task: str | None = "CAUSAL_LM", **more: Any
) -> None:
    config = LoraConfig(
        task_type=task, r=rank, lora_alpha=2 * rank, target_modules="all-linear",
        lora_dropout=0.1, **more,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of a second adapter, and of tied weights.
        model.add_adapter(config, name)
    model.eval()


@torch.no_grad()
def _shake(module: nn.Module, generator: torch.Generator, *, everything: bool = False) -> None:
    """Give what is trained values of its own."""
    for name, parameter in module.named_parameters():
        trained = "lora_" in name or "modules_to_save" in name or "embed" in name or "head" in name
        if everything or trained:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


transformers_logging.disable_progress_bar()


def _adapter(model: Any, name: str) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        # Some releases of peft add resized embeddings here; the published files lack them.
        warnings.simplefilter("ignore")
        state = model.get_adapter_state_dict(name)
    return {key: tensor for key, tensor in state.items() if "lora_" in key}
