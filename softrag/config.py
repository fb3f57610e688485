"""What a softrag checkpoint is made of. It knows nothing of tensors."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

SHARED = "shared"
"""Name of the compressor that is the decoder's own backbone, with adapters of its own (PISCO)."""

READOUTS = ("memory", "window", "words")

DOCUMENT_PROMPT = {
    "document": "{document}",
    "document_with_question": "Question: {question}\n\n{document}",
}
RAG_PROMPT = {
    "system": "Answer the question from the background, as briefly as possible.",
    "user": "Background:\n{documents}\n\nQuestion: {question}",
    "user_without_documents": "Question: {question}",
    "document_separator": "\n",
}


class SoftRAGConfig(PreTrainedConfig):
    """Configuration of a `SoftRAGModel`; saved beside its weights.

    Attributes:
        decoder: Name or folder of the decoder's base language model.
        decoder_config: The decoder's own configuration, so that its shape is known without it.
        compressor: Name or folder of the compressor's base language model, or `"shared"` for the
            decoder's backbone with adapters of its own.
        compressor_config: The compressor's own configuration; None when shared.
        compressor_layers: Keep only the first so many layers of the compressor; None keeps all
            (OSCAR, section 3: "N-layers" compressors).
        rate: Document tokens per soft token; 16 turns 128 tokens into 8.
        rates: The rates it was trained at, where they are several: any of them may be asked for
            when loading. None: `rate` alone.
        memory_tokens: A fixed number of soft tokens for every document; None makes it proportional,
            `ceil(tokens / rate)`.
        max_document_tokens: The longest document one memory holds, in compressor tokens.
        query_dependent: The compressor reads the question with the document (OSCAR).
        rerank: A query-dependent compressor also scores the document for the question, from the
            last state of an `<RR>` token behind the `<MEM>` tokens (OSCAR, section 3).
        readout: `"memory"`: a soft token is the last state of its `<MEM>` token (both papers).
            `"window"`: each `<MEM>` token owns an equal window of the document; it stands at the
            window's end, starts from the mean of the window's embeddings, and is read out together
            with the mean of the window's last states (mean pooling: arXiv 2510.20797). `"words"`:
            the same, and the mean of the window's embeddings is added to the soft token through a
            linear map, so that a decoder of the same family finds a window by its words.
        connector_hidden: Width of the connector's hidden layer; None is the identity, for a
            compressor that shares the decoder's backbone.
        decoder_lora: `{"r", "alpha", "dropout"}` of the decoder's adapters; None: no adapters.
        compressor_lora: The same for the compressor; None: every compressor weight is trained.
        document_prompt: Texts of `DocumentPrompt`.
        rag_prompt: Texts of `RagPrompt`.
        storage: How trained base weights are stored: `"full"`, or `"int8"`: the difference to the
            base weights, quantised to 8 bits with one scale per row.
        fingerprint: Of everything that decides a memory's values; written when saved.
    """

    model_type = "softrag"

    decoder: str | None = None
    decoder_config: dict[str, Any] | None = None
    compressor: str | None = None
    compressor_config: dict[str, Any] | None = None
    compressor_layers: int | None = None
    rate: int = 16
    rates: list[int] | None = None
    memory_tokens: int | None = None
    max_document_tokens: int = 256
    query_dependent: bool = False
    rerank: bool = False
    readout: str = "window"
    connector_hidden: int | None = 2048
    decoder_lora: dict[str, Any] | None = None
    compressor_lora: dict[str, Any] | None = None
    document_prompt: dict[str, str] = field(default_factory=lambda: dict(DOCUMENT_PROMPT))
    rag_prompt: dict[str, str] = field(default_factory=lambda: dict(RAG_PROMPT))
    storage: str = "full"
    fingerprint: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the values that would otherwise fail far from their cause."""
        super().__post_init__(**kwargs)
        if self.rate < 1:
            raise ValueError(
                f"rate is {self.rate}; it must be 1 or more document tokens per soft token."
            )
        if self.rates is not None and self.rate not in self.rates:
            raise ValueError(
                f"rate is {self.rate}, which is not among the rates {self.rates}; add it there, or "
                "choose one of them."
            )
        if self.rates is not None and (min(self.rates) < 1 or self.memory_tokens is not None):
            raise ValueError(
                f"rates is {self.rates} and memory_tokens {self.memory_tokens}; several rates must "
                "be 1 or more each, and documents have no fixed number of soft tokens."
            )
        if self.memory_tokens is not None and self.memory_tokens < 1:
            raise ValueError(f"memory_tokens is {self.memory_tokens}; use None or at least 1.")
        if self.max_document_tokens < 1:
            raise ValueError(f"max_document_tokens is {self.max_document_tokens}; use at least 1.")
        if self.rerank and not self.query_dependent:
            raise ValueError(
                "rerank scores a document for a question: it needs query_dependent as well."
            )
        if self.readout not in READOUTS:
            raise ValueError(f"readout is {self.readout!r}; expected one of {READOUTS}.")

    @property
    def shares_backbone(self) -> bool:
        """Whether one set of base weights serves both compressor and decoder."""
        return self.compressor == SHARED

    def sub_config(self, part: str) -> PreTrainedConfig:
        """Return the configuration of `"decoder"` or `"compressor"` as its own class."""
        if part == "compressor" and self.shares_backbone:
            part = "decoder"
        values = self.decoder_config if part == "decoder" else self.compressor_config
        if values is None:
            raise ValueError(
                f"The configuration has no {part}_config. Build models with "
                "SoftRAGModel.from_base, which fills it in."
            )
        values = dict(values)
        return AutoConfig.for_model(values.pop("model_type"), **values)


AutoConfig.register(SoftRAGConfig.model_type, SoftRAGConfig, exist_ok=True)
