"""Checkpoints of the research code of 2026 (`model_type` "PISCO").

    config.json                                   names the base models
    decoder_state.pt                              adapters, embeddings and head, as peft keeps them
    compressor/                                   a whole language model
    connector.pt                                  two linear layers
    compressor_tokenizer/, decoder_tokenizer/     with `<MEM>`, and `<AE>` in the latter

A document gets a memory token for every `rate` tokens and one more, the question (OSCAR) counted
in. Whether documents are compressed for a question is not in its config.json, because it is an
option of training there: set "query_dependent": true for a model that was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from softrag.checkpoint import Source
from softrag.config import SoftRAGConfig
from softrag.errors import CheckpointError
from softrag.layouts.base import around, read_base, read_tokenizer
from softrag.layouts.fields import FieldReader
from softrag.layouts.pickled import read_tensors
from softrag.layouts.renamed import Renamed, checked_rows, memory_rows
from softrag.layouts.summary import Summary
from softrag.prompt import AUTO_ENCODING_TOKEN, token_id
from softrag.weights import StoredTensor, read_json, read_safetensors

RAG_PROMPT = {
    "system": (
        "You are a helpful assistant. Your task is to extract relevant information from provided "
        "documents and to answer to questions as briefly as possible."
    ),
    "user": "\n\nBackground:{documents}\n Question: {question}",
    "user_without_documents": "\n Question: {question}",
    "user_with_system": "{system}\n{user}",
    "memory": "Document {number}:{document}",
    "text": "Document {number}:{document}",
    "document_separator": "",
}
# The longest row of its collators, unless told otherwise.
_MAX_ROW_TOKENS = 512
_DECODER = "decoder_state.pt"
_CONNECTOR = "connector.pt"
# peft keeps a trained copy beside the original of every module that it trains whole.
_TRAINED_COPY = re.compile(r"\.modules_to_save\.\w+\.")
_ORIGINAL = ".original_module."


@dataclass(frozen=True)
class _Settings:
    """What config.json says; what it leaves out has the original's default."""

    decoder: str
    compressor: str
    rate: int
    connector_hidden: int
    rank: int
    query_dependent: bool

    @classmethod
    def read(cls, folder: Path) -> _Settings:
        path = folder / "config.json"
        get = FieldReader(path, read_json(path))
        if not get("lora_decoder", True, bool):
            raise CheckpointError(
                f"{path} says lora_decoder: false. Softrag reads this layout with adapters only."
            )
        settings = cls(
            decoder=get("decoder_model_name", "Qwen/Qwen3-8B", str),
            compressor=get("compressor_model_name", "Qwen/Qwen3-0.6B", str),
            rate=get("compr_rate", 16, int),
            connector_hidden=get("compressor_mlp_hidden_dim", 4096, int),
            rank=get("lora_r_decoder", 64, int),
            query_dependent=get("query_dependent", False, bool),
        )
        if settings.rate < 1 or settings.rank < 1:
            raise CheckpointError(
                f"{path} says compr_rate {settings.rate} and lora_r_decoder {settings.rank}; both "
                "must be at least 1. Restore the file."
            )
        return settings


def summarize(folder: Path) -> Summary:
    """Say what a checkpoint is, from its config.json alone."""
    settings = _Settings.read(folder)
    return Summary(
        layout="PISCO",
        decoder=settings.decoder,
        compressor=settings.compressor,
        rate=settings.rate,
        memory_tokens=None,
        max_document_tokens=_MAX_ROW_TOKENS,
        query_dependent=settings.query_dependent,
    )


def open_source(folder: Path, *, base_model: str | Path | None = None) -> Source:
    """Open a checkpoint; see `softrag.layouts.open_source`."""
    settings = _Settings.read(folder)
    decoder = read_base(str(base_model or settings.decoder), folder)
    shape_of_compressor = read_json(folder / "compressor" / "config.json")
    compressor_tokenizer = read_tokenizer(folder / "compressor_tokenizer")
    decoder_tokenizer = read_tokenizer(folder / "decoder_tokenizer")
    before, after = around(compressor_tokenizer)
    extra = len(compressor_tokenizer.encode("", add_special_tokens=True))
    shape = dict(decoder.shape)
    # Its head is trained apart from its embeddings even where the base model has one matrix.
    shape["tie_word_embeddings"] = False
    config = SoftRAGConfig(
        decoder=decoder.name,
        decoder_config=shape,
        decoder_vocabulary=len(decoder_tokenizer),
        decoder_lora={"r": settings.rank, "alpha": 2 * settings.rank, "dropout": 0.1},
        compressor=settings.compressor,
        compressor_config=shape_of_compressor,
        compressor_vocabulary=len(compressor_tokenizer),
        connector_hidden=settings.connector_hidden,
        rate=settings.rate,
        memory_count="row",
        max_document_tokens=_MAX_ROW_TOKENS - extra,
        max_row_tokens=_MAX_ROW_TOKENS,
        query_dependent=settings.query_dependent,
        readout="memory",
        prompt_encoding="whole",
        document_prompt={
            "document": f"{before}{{document}}{after}",
            "document_with_question": (
                f"{before}Query: {{question}}\n Document: {{document}}{after}"
            ),
        },
        rag_prompt=RAG_PROMPT,
    )

    def tensors(wanted: Callable[[str], bool]) -> Iterator[StoredTensor]:
        found = Renamed()
        path = folder / _DECODER
        for name, tensor in read_tensors(path).items():
            if _ORIGINAL in name:
                continue  # The base model's own, which the trained copy stands in for.
            renamed = _TRAINED_COPY.sub(".", name)
            found.add_lora(path, "decoder.", {renamed: tensor})
            if renamed == "model.embed_tokens.weight":
                rows = checked_rows(path, tensor, len(decoder_tokenizer))
                added = rows[token_id(decoder_tokenizer, AUTO_ENCODING_TOKEN)]
                found.add(path, {"auto_encoding_embedding": added})
        found.add_connector(folder / _CONNECTOR, read_tensors(folder / _CONNECTOR))
        for name, tensor, file in read_safetensors(folder / "compressor", "model", _is_backbone):
            found.add(file, {f"compressor.{name.removeprefix('model.')}": tensor})
            if name == "model.embed_tokens.weight":
                rows = checked_rows(file, tensor, len(compressor_tokenizer))
                memory = memory_rows(rows, compressor_tokenizer, config)
                found.add(file, {"memory_embedding": memory})
        yield from (tensor for name, tensor in found.items() if wanted(name))

    return Source(
        folder=folder,
        layout="PISCO",
        config=config,
        compressor_tokenizer=compressor_tokenizer,
        decoder_tokenizer=decoder_tokenizer,
        tensors=tensors,
    )


def _is_backbone(name: str) -> bool:
    # Soft tokens are read below the compressor's own head.
    return name != "lm_head.weight"
