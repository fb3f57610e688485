"""PISCO, OSCAR's family and CLaRa as published on the hub (`model_type` "COCOM" and "CLaRa").

    config.json                       names the base model and the lengths
    adapters.pth                      {"decoder_adapter": {...}, "encoder_adapter": {...}}
    decoder_first_last_layers.pth     embeddings and head, with rows for the special tokens
    compressor/                       only with a compressor model of its own:
        compressor.pth                every weight of it, or
        first_layer.pth, compressor_adapters.pth
        mlp.pth                       the connector

Special tokens: `<MEM0>`, …, `<AE>`, `<ENC>`, `<SEP>`, in this order. The compressor reads `<ENC>`,
bos, document, eos and the memory tokens, and what stands at these after its last norm goes to the
decoder as it is. In the decoder's prompt, `<SEP>` follows every document. Papers: arXiv 2501.16075
(PISCO), 2504.07109 (OSCAR), 2511.18659 (CLaRa).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from softrag.checkpoint import Source
from softrag.config import SHARED, SoftRAGConfig
from softrag.errors import CheckpointError
from softrag.layouts.base import BaseModel, around, read_base, with_tokens
from softrag.layouts.fields import FieldReader
from softrag.layouts.pickled import only_tensors, read_pickled, read_tensors
from softrag.layouts.renamed import Renamed, checked_rows, memory_rows
from softrag.layouts.summary import Summary
from softrag.prompt import AUTO_ENCODING_TOKEN, token_id
from softrag.weights import StoredTensor, read_json

RAG_PROMPT = {
    "system": (
        "You are a helpful assistant. Your task is to extract relevant information from provided "
        "documents and to answer to questions as briefly as possible."
    ),
    "user": "Background:\n{documents}\n\nQuestion:{question}",
    "user_without_documents": "Question:{question}",
    "user_with_system": "{system}\n{user}",
    "memory": "{document}<SEP>",
    "text": "{document}\n",
    "document_separator": "",
}
# Of bergen, which calls models that read the question with so many tokens more.
_QUESTION_TOKENS = 64

_ADAPTERS = "adapters.pth"
_EMBEDDINGS = "decoder_first_last_layers.pth"
_BIDIRECTIONAL = ("bert", "roberta", "xlm-roberta", "distilbert", "deberta-v2", "modernbert")
# CLaRa's third adapter rewrites questions for its own retriever; answering has no use for it.
_UNUSED_ADAPTERS = ("query_reasoner_adapter",)


@dataclass(frozen=True)
class _Settings:
    """What config.json says; what it leaves out has the original's default."""

    path: Path
    model_type: str
    decoder: str
    compressor: str | None
    layers: int | None
    norm: bool
    rate: int
    memory_tokens: int
    distinct: bool
    max_tokens: int
    rank: int
    compressor_rank: int | None
    connector_hidden: int | None
    one_adapter: bool
    query_dependent: bool
    extra_tokens: list[str]

    @property
    def max_row_tokens(self) -> int:
        """Where the original cuts what the compressor reads."""
        return self.max_tokens + (_QUESTION_TOKENS + 8 if self.query_dependent else 3)

    @classmethod
    def read(cls, folder: Path) -> _Settings:
        path = folder / "config.json"
        get = FieldReader(path, read_json(path))
        kind = get("model_type", "", str)
        if not get("sep", False, bool):
            raise CheckpointError(
                f"{path} says sep: false, but these prompts always have <SEP> behind a document: "
                "every document after the first would be read one place early, or more. If the "
                'model was trained with <SEP>, as all published ones are, set "sep": true.'
            )
        if not get("lora", False, bool):
            raise CheckpointError(
                f"{path} says lora: false. Softrag reads this layout with adapters only; no "
                "checkpoint of this kind without them is known."
            )
        if list(folder.glob("model*.safetensors*")) and not (folder / _ADAPTERS).is_file():
            raise CheckpointError(
                f"{folder} looks like COCOM v0 or v1 (whole weights, memory tokens in front of the "
                "document). Softrag does not read it: what its weights were trained on cannot be "
                "told from the files. Take a PISCO checkpoint, which replaced it."
            )
        max_tokens, rate = get("doc_max_length", 128, int), get("compr_rate", 64, int)
        if rate < 1 or max_tokens // rate < 1:
            raise CheckpointError(
                f"{path} says doc_max_length {max_tokens} and compr_rate {rate}, which leaves no "
                "soft token. Restore the file."
            )
        # CLaRa's code has the field, and never a compressor of its own.
        name = get("compr_model_name", "google-bert/bert-base-uncased", str)
        compressor = None if kind == "CLaRa" else name
        if compressor == "mistral_trimmed":
            compressor = get.required("compr_base_model_name", str)
        if get("compr_every_n_layer", None, int) is not None:
            raise CheckpointError(
                f"{path} says compr_every_n_layer. Softrag reads compressors of the first layers "
                "of a model (compr_n_layers), not of layers picked from it."
            )
        trimmed = name == "mistral_trimmed"
        rank = get("lora_r", 16, int)
        lora_compressor = get("lora_compressor", False, bool)
        return cls(
            path=path,
            model_type=kind,
            decoder=get.required("decoder_model_name", str),
            compressor=compressor,
            layers=get("compr_n_layers", None, int) if trimmed else None,
            norm=get("compr_rms_norm", False, bool) if trimmed else True,
            rate=rate,
            memory_tokens=max_tokens // rate,
            distinct=get("different_mem_tokens", False, bool),
            max_tokens=max_tokens,
            rank=rank,
            compressor_rank=(get("lora_r_compressor", None, int) or rank)
            if lora_compressor
            else None,
            connector_hidden=get("compr_mlp_hidden_dim", 8096, int)
            if get("compr_use_mlp", True, bool)
            else None,
            one_adapter=kind != "CLaRa" and get("training_form", "both", str) == "both",
            # Not a field of the original, where it is an argument of every call: OSCAR's family is
            # trained with the question, models that compress with the decoder are not.
            query_dependent=get("query_dependent", compressor is not None, bool),
            extra_tokens=["<ENC>", "<SEP>"] + ["<KBTC>"] * get("kbtc_training", False, bool),
        )


def summarize(folder: Path) -> Summary:
    """Say what a checkpoint is, from its config.json alone."""
    settings = _Settings.read(folder)
    return Summary(
        layout=settings.model_type,
        decoder=settings.decoder,
        compressor=settings.compressor or SHARED,
        rate=settings.rate,
        memory_tokens=settings.memory_tokens,
        max_document_tokens=settings.max_tokens,
        query_dependent=settings.query_dependent,
    )


def open_source(folder: Path, *, base_model: str | Path | None = None) -> Source:
    """Open a checkpoint; see `softrag.layouts.open_source`."""
    settings = _Settings.read(folder)
    decoder = read_base(str(base_model or settings.decoder), folder)
    config = SoftRAGConfig(
        decoder=decoder.name,
        decoder_config=decoder.shape,
        rate=settings.rate,
        memory_tokens=settings.memory_tokens,
        distinct_memory_tokens=settings.distinct,
        extra_tokens=settings.extra_tokens,
        max_document_tokens=settings.max_tokens,
        query_dependent=settings.query_dependent,
        readout="memory",
        decoder_lora={"r": settings.rank, "alpha": 2 * settings.rank, "dropout": 0.1},
        prompt_encoding="whole",
        rag_prompt=RAG_PROMPT,
    )
    with_tokens(decoder.tokenizer, config)
    config.decoder_vocabulary = len(decoder.tokenizer)
    if settings.compressor is None:
        _share_backbone(config, settings, decoder)
        compressor_tokenizer = decoder.tokenizer
    else:
        moved = base_model is not None and settings.compressor == settings.decoder
        place = str(base_model) if moved else settings.compressor
        compressor_tokenizer = _add_compressor(config, settings, read_base(place, folder))

    def tensors(wanted: Callable[[str], bool]) -> Iterator[StoredTensor]:
        stored = _decoder_tensors(folder, decoder.tokenizer, config, settings)
        if settings.compressor is not None:
            stored.update(_compressor_tensors(folder, compressor_tokenizer, config))
        yield from (tensor for name, tensor in stored.items() if wanted(name))

    return Source(
        folder=folder,
        layout=settings.model_type,
        config=config,
        compressor_tokenizer=compressor_tokenizer,
        decoder_tokenizer=decoder.tokenizer,
        tensors=tensors,
    )


# ---------------------------------------------------------------------- configuration


def _share_backbone(config: SoftRAGConfig, settings: _Settings, decoder: BaseModel) -> None:
    """Describe a compressor that is the decoder with the encoder's adapter."""
    bos, eos = decoder.tokenizer.bos_token, decoder.tokenizer.eos_token
    if bos is None and "<|im_start|>" in decoder.tokenizer.get_vocab():
        bos = "<|im_start|>"  # Qwen has none; the original takes its first special token.
    if bos is None or eos is None:
        raise CheckpointError(
            f"The tokenizer of {decoder.name} has no bos or eos token, and the compressor's input "
            "has both. Another base model was used for this checkpoint; give it as base_model=."
        )
    config.compressor = SHARED
    config.compressor_lora = dict(config.decoder_lora or {})
    config.connector_hidden = None
    config.document_prompt = {
        "document": f"<ENC>{bos}{{document}}{eos}",
        "document_with_question": f"<ENC>{bos}\nQuery:\n{{question}}Document:\n{{document}}{eos}",
    }
    config.max_row_tokens = settings.max_row_tokens


def _add_compressor(
    config: SoftRAGConfig, settings: _Settings, compressor: BaseModel
) -> PreTrainedTokenizerBase:
    """Describe a compressor with a model and tokenizer of its own; return the tokenizer."""
    if compressor.shape.get("model_type") in _BIDIRECTIONAL:
        raise CheckpointError(
            f"{settings.path} names {compressor.name!r} as compressor, which reads in both "
            "directions (COCOM-light). Softrag reads decoder-only compressors. If the checkpoint "
            'compresses with its decoder, as PISCO does, set "compr_model_name": null.'
        )
    tokenizer = compressor.tokenizer
    before, after = around(tokenizer)
    tokenizer.add_tokens(config.memory_token_names, special_tokens=True)
    config.compressor = compressor.name
    config.compressor_config = compressor.shape
    config.compressor_layers = settings.layers
    config.compressor_norm = settings.norm
    config.compressor_vocabulary = len(tokenizer)
    config.connector_hidden = settings.connector_hidden
    if settings.compressor_rank is not None:
        rank = settings.compressor_rank
        config.compressor_lora = {"r": rank, "alpha": 2 * rank, "dropout": 0.1}
    config.document_prompt = {
        "document": f"{before}{{document}}{after}",
        "document_with_question": f"{before}\nQuery:\n{{question}}Document:\n{{document}}{after}",
    }
    config.max_row_tokens = settings.max_row_tokens
    return tokenizer


# ---------------------------------------------------------------------- tensors


def _decoder_tensors(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: SoftRAGConfig,
    settings: _Settings,
) -> dict[str, StoredTensor]:
    """Read adapters and embeddings, under softrag's names."""
    found = Renamed()
    path = folder / _ADAPTERS
    adapters = read_pickled(path)
    if config.shares_backbone and settings.one_adapter and "decoder_adapter" in adapters:
        adapters.setdefault("encoder_adapter", adapters["decoder_adapter"])
    ends = read_tensors(folder / _EMBEDDINGS)
    for adapter, values in adapters.items():
        # Some releases of peft save resized embeddings with every adapter: the same ones again.
        tensors = {
            name: tensor
            for name, tensor in only_tensors(path, values).items()
            if name not in ends or not torch.equal(tensor, ends[name])
        }
        if adapter == "decoder_adapter":
            found.add_lora(path, "decoder.", tensors)
        elif adapter == "encoder_adapter" and config.shares_backbone:
            found.add_lora(path, "compressor.", tensors, drop="model.")
        elif adapter not in _UNUSED_ADAPTERS:
            found.add(path, {f"{adapter}.{name}": tensor for name, tensor in tensors.items()})
    path = folder / _EMBEDDINGS
    found.add(path, {f"decoder.{name}": tensor for name, tensor in ends.items()})
    embeddings = ends.get("model.embed_tokens.weight")
    if embeddings is not None:
        rows = checked_rows(path, embeddings, len(tokenizer))
        auto_encoding = rows[token_id(tokenizer, AUTO_ENCODING_TOKEN)]
        found.add(path, {"auto_encoding_embedding": auto_encoding})
        if config.shares_backbone:
            found.add(path, {"memory_embedding": memory_rows(rows, tokenizer, config)})
    return found


def _compressor_tensors(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: SoftRAGConfig,
) -> dict[str, StoredTensor]:
    """Read a compressor of its own and the connector, under softrag's names."""
    found = Renamed()
    folder = folder / "compressor"
    if config.compressor_lora is None:
        path = folder / "compressor.pth"
        whole = {_backbone_name(name): tensor for name, tensor in read_tensors(path).items()}
    else:
        path = folder / "compressor_adapters.pth"
        stored = read_pickled(path)
        adapter = only_tensors(path, stored.get("compr_adapter", stored))
        found.add_lora(
            path, "compressor.", {_backbone_name(name): t for name, t in adapter.items()}
        )
        path = folder / "first_layer.pth"
        whole = {_backbone_name(name): tensor for name, tensor in read_tensors(path).items()}
    found.add(path, {f"compressor.{name}": tensor for name, tensor in whole.items()})
    if "embed_tokens.weight" in whole:
        rows = checked_rows(path, whole["embed_tokens.weight"], len(tokenizer))
        found.add(path, {"memory_embedding": memory_rows(rows, tokenizer, config)})
    if config.connector_hidden is not None:
        found.add_connector(folder / "mlp.pth", read_tensors(folder / "mlp.pth"))
    return found


def _backbone_name(name: str) -> str:
    for prefix in ("custom_model.", "model."):
        name = name.removeprefix(prefix)
    return name
