"""What a softrag checkpoint is made of. It knows nothing of tensors."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from softrag.checks import check_copy_bias

SHARED = "shared"
"""Name of the compressor that is the decoder's own backbone, with adapters of its own (PISCO)."""

READOUTS = ("memory", "window", "words", "pooled")
CONNECTORS = ("relu", "standardized")
MEMORY_COUNTS = ("document", "row")
PROMPT_ENCODINGS = ("parts", "whole")

DOCUMENT_PROMPT = {
    "document": "{document}",
    # Before the document, to read it for the question; behind it, where a language model answers
    # (ours: 16.1 F1 after a short training, and 14.7 with the question before it alone).
    "document_with_question": (
        "Question: {question}\n\n{document}\n\nQuestion: {question}\nAnswer:"
    ),
}
RAG_PROMPT = {
    "system": "Answer the question from the background, as briefly as possible.",
    "user": "Background:\n{documents}\n\nQuestion: {question}",
    "user_without_documents": "Question: {question}",
    "user_with_system": "{system}\n\n{user}",
    "memory": "{document}",
    "text": "{document}",
    "document_separator": "\n",
}
ASKED_FIRST = "Question: {question}\n\nBackground:\n{documents}\n\nQuestion: {question}"
"""Another `user` text of `RagPrompt`: a decoder that only looks back reads memories knowing what is
asked (reading twice: arXiv 2407.05483)."""


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
        compressor_norm: Whether the norm behind the compressor's last layer is applied.
        rate: Document tokens per soft token; 16 turns 128 tokens into 8.
        rates: The rates it was trained at, where they are several: any of them may be asked for
            when loading. None: `rate` alone.
        memory_tokens: A fixed number of soft tokens for every document; None makes it proportional.
        memory_count: What a proportional number counts. `"document"`: `ceil(n / rate)` of the
            document's tokens. `"row"`: `n // rate + 1` of all that the compressor reads (the
            research code of 2026).
        distinct_memory_tokens: Whether each of `memory_tokens` soft tokens has a token, `<MEM0>`,
            `<MEM1>`, …, and an embedding of its own (PISCO), instead of `<MEM>` for all.
        extra_tokens: Special tokens behind `<AE>` that the prompts' texts use, such as `<SEP>`.
        decoder_vocabulary: Rows of the decoder's own embeddings and head, when the checkpoint holds
            them; None: those of the base model.
        compressor_vocabulary: Rows of the compressor's own embeddings, when the checkpoint holds
            them, as it then holds every other weight of a compressor without adapters; None: those
            of the base model.
        max_document_tokens: The longest document one memory holds, in compressor tokens.
        max_row_tokens: Where a document that is not split is cut: most tokens of what the
            compressor reads, memory tokens aside (the research code's cut); None cuts the document
            at `max_document_tokens` and keeps what stands around it.
        query_dependent: The compressor reads the question with the document (OSCAR).
        rerank: A query-dependent compressor also scores the document for the question, from the
            last state of an `<RR>` token behind the `<MEM>` tokens (OSCAR, section 3).
        readout: `"memory"`: a soft token is the last state of its `<MEM>` token (both papers).
            `"window"`: each `<MEM>` token owns an equal window of the document; it stands at the
            window's end, starts from the mean of the window's embeddings, and is read out together
            with the mean of the window's last states (mean pooling: arXiv 2510.20797). `"words"`:
            the same, and the mean of the window's embeddings is added to the soft token through a
            linear map, so that a decoder of the same family finds a window by its words.
            `"pooled"`: the same with their sum over the root of their number, in the place of the
            mean: the size that the decoder expects whatever the rate, and near rate 1, where a
            window is a word, soft tokens are the words' embeddings.
        connector: `"relu"`: two linear layers with ReLU between (OSCAR). `"standardized"`: the
            states less their mean and over their spread, as measured once, through a linear layer
            and two with GELU between beside it; a ReLU that only sees the mean dies.
        connector_hidden: Width of the connector's hidden layer; None is the identity, for a
            compressor that shares the decoder's backbone.
        decoder_lora: `{"r", "alpha", "dropout"}` of the decoder's adapters; None: no adapters.
        compressor_lora: The same for the compressor; None: every compressor weight is trained.
        prompt_encoding: `"parts"`: user text is tokenized apart from the prompt around it.
            `"whole"`: as one string with it, as the research code does; bos and other special
            tokens are then written in the texts.
        document_prompt: Texts of `DocumentPrompt`.
        rag_prompt: Texts of `RagPrompt`; what is left out is as in `RAG_PROMPT`.
        copy_bias: What answers from memories are biased by unless the user says, as in `SoftRAG`;
            chosen on questions like those it was trained on. It changes no memory.
        storage: How trained weights are stored: `"full"`, or adapters and the differences to base
            weights quantised, `"int8"` with one scale per row, `"int4"` with one per 64 values.
        fingerprint: Of everything that decides a memory's values; written when saved.
        checksums: Of the files with the weights, by name; written when saved.
    """

    model_type = "softrag"

    decoder: str | None = None
    decoder_config: dict[str, Any] | None = None
    compressor: str | None = None
    compressor_config: dict[str, Any] | None = None
    compressor_layers: int | None = None
    compressor_norm: bool = True
    rate: int = 16
    rates: list[int] | None = None
    memory_tokens: int | None = None
    memory_count: str = "document"
    distinct_memory_tokens: bool = False
    extra_tokens: list[str] = field(default_factory=list)
    decoder_vocabulary: int | None = None
    compressor_vocabulary: int | None = None
    max_document_tokens: int = 256
    max_row_tokens: int | None = None
    query_dependent: bool = False
    rerank: bool = False
    readout: str = "window"
    connector: str = "relu"
    connector_hidden: int | None = 2048
    decoder_lora: dict[str, Any] | None = None
    compressor_lora: dict[str, Any] | None = None
    prompt_encoding: str = "parts"
    document_prompt: dict[str, str] = field(default_factory=lambda: dict(DOCUMENT_PROMPT))
    rag_prompt: dict[str, str] = field(default_factory=lambda: dict(RAG_PROMPT))
    copy_bias: float = 0.0
    storage: str = "full"
    fingerprint: str | None = None
    checksums: dict[str, str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the values that would otherwise fail far from their cause."""
        super().__post_init__(**kwargs)
        if not isinstance(self.rate, int) or self.rate < 1:
            raise ValueError(
                f"rate is {self.rate!r}; it must be 1 or more document tokens per soft token."
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
        if not isinstance(self.max_document_tokens, int) or self.max_document_tokens < 1:
            raise ValueError(
                f"max_document_tokens is {self.max_document_tokens!r}; use a number of at least 1."
            )
        if self.rerank and not self.query_dependent:
            raise ValueError(
                "rerank scores a document for a question: it needs query_dependent as well."
            )
        for name, known in (
            ("readout", READOUTS),
            ("connector", CONNECTORS),
            ("memory_count", MEMORY_COUNTS),
            ("prompt_encoding", PROMPT_ENCODINGS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {known}.")
        if self.distinct_memory_tokens and self.memory_tokens is None:
            raise ValueError("distinct_memory_tokens needs memory_tokens: how many there are.")
        check_copy_bias(self.copy_bias)
        self.rag_prompt = RAG_PROMPT | self.rag_prompt

    @property
    def shares_backbone(self) -> bool:
        """Whether one set of base weights serves both compressor and decoder."""
        return self.compressor == SHARED

    @property
    def adds_words(self) -> bool:
        """Whether the words of a soft token's window are added to it."""
        return self.readout in ("words", "pooled")

    @property
    def stores_compressor(self) -> bool:
        """Whether the checkpoint holds every weight of the compressor, embeddings included."""
        return self.compressor_vocabulary is not None and self.compressor_lora is None

    @property
    def memory_token_names(self) -> list[str]:
        """The distinct memory tokens, in the order in which a document's soft tokens use them."""
        if self.distinct_memory_tokens:
            return [f"<MEM{index}>" for index in range(self.memory_tokens or 0)]
        return ["<MEM>"]

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
