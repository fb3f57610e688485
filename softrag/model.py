"""The model: tensors in, tensors out. It knows nothing of texts, prompts or stores.

A compressor language model turns a document into the states of its `<MEM>` tokens, a connector
maps them into the decoder's embedding space (soft tokens), and the decoder language model reads
them in the place of the document. PISCO (Louis et al., ACL Findings 2025, arXiv 2501.16075) and
OSCAR (Louis et al., ICLR 2026, arXiv 2504.07109).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from softrag import checkpoint, layouts, loading
from softrag.adapters import merge_lora
from softrag.backbones import (
    LanguageModel,
    build_compressor,
    build_decoder,
    choose_device,
    embeddings_name,
    freeze_and_adapt,
    read_without_padding,
)
from softrag.batch import IGNORED
from softrag.config import SoftRAGConfig
from softrag.connector import Connector, StandardizedConnector
from softrag.errors import PlaceholderMismatchError
from softrag.fingerprint import fingerprint_of
from softrag.fused import FusedBackbone, PackedRunner, why_not_fused
from softrag.packing import Packed, pack, run_rows, send
from softrag.placeholders import Placeholders, expand_spans, find_tokens
from softrag.prompt import (
    AUTO_ENCODING_TOKEN,
    MEMORY_TOKEN,
    RERANK_TOKEN,
    add_rerank_token,
    token_id,
)
from softrag.reading import Read, in_compute_dtype, read_documents
from softrag.weights import FIXED_WEIGHTS, trained_parameters

logger = logging.getLogger(__name__)


class Compressed(NamedTuple):
    """What the compressor makes of documents.

    Attributes:
        soft_tokens: `(soft tokens of all documents in order, decoder hidden)`.
        scores: `(documents,)` float32 logits of being relevant to the question; None from models
            without a rerank head.
    """

    soft_tokens: torch.Tensor
    scores: torch.Tensor | None


@dataclass
class SoftRAGOutput(CausalLMOutput):
    """A causal language model's output, with the `scores` of `Compressed`.

    `said_loss` is the cross entropy of `soft_token_labels`, where they were given: its mean over
    those of a soft token, summed over the soft tokens.
    """

    scores: torch.Tensor | None = None
    said_loss: torch.Tensor | None = None


class SoftRAGModel(PreTrainedModel):
    """Compressor, connector and decoder.

    Build one from base language models with `from_base`, load a trained one with
    `from_pretrained`. Either part may be left out when only the other is needed.
    """

    config_class = SoftRAGConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    config: SoftRAGConfig
    decoder: LanguageModel | None
    compressor: LanguageModel | None

    def __init__(
        self,
        config: SoftRAGConfig,
        decoder: LanguageModel | None = None,
        compressor: LanguageModel | None = None,
        *,
        load_decoder: bool = True,
        load_compressor: bool = True,
    ) -> None:
        """Wire the parts; those not given are built from their configs with random weights."""
        super().__init__(config)
        self.decoder_embeddings_name: str | None = None
        if decoder is not None or load_decoder or config.shares_backbone:
            decoder = build_decoder(config, decoder)
            self.decoder_embeddings_name = f"decoder.{embeddings_name(decoder)}"
        if compressor is not None or load_compressor:
            compressor = build_compressor(config, compressor, decoder)
        self.decoder = decoder if load_decoder else None
        self.compressor = compressor if load_compressor else None
        self.compressor_tokenizer: PreTrainedTokenizerBase | None = None
        self.decoder_tokenizer: PreTrainedTokenizerBase | None = None
        self._fingerprint: str | None = None
        self._loss = _summed_loss
        self._said_loss = _summed_said_loss
        self._fused_compressor: PackedRunner | None = None

        decoder_width = config.sub_config("decoder").hidden_size
        if self.compressor is not None:
            width = self.compressor.config.hidden_size
            read_without_padding(self.compressor)
            # One for all memory tokens, or one each.
            distinct = (config.memory_tokens,) if config.distinct_memory_tokens else ()
            self.memory_embedding = nn.Parameter(torch.zeros(*distinct, width))
            self.connector: nn.Module = nn.Identity()
            if config.connector_hidden is not None:
                kind = StandardizedConnector if config.connector == "standardized" else Connector
                self.connector = kind(width, config.connector_hidden, decoder_width)
            if config.adds_words:
                self.word_projection = nn.Linear(width, decoder_width, bias=False)
            if config.connector_hidden is None and width != decoder_width:
                raise ValueError(
                    f"Without a connector the compressor's width ({width}) must be the decoder's "
                    f"({decoder_width}); set connector_hidden."
                )
            if config.rerank:
                self._build_rerank_head()
        if self.decoder is not None:
            read_without_padding(self.decoder)
            self.auto_encoding_embedding = nn.Parameter(torch.zeros(decoder_width))
        self.post_init()
        # Last: `post_init` draws the weights of layers that a base model does not know, and an
        # adapter's second factor, which must start at zero, would start as noise.
        freeze_and_adapt(config, self.decoder, self.compressor)

    def _init_weights(self, module: nn.Module) -> None:
        """Leave weights alone: the base models and peft initialise their own."""

    def _build_rerank_head(self) -> None:
        assert self.compressor is not None
        width, device = self.compressor.config.hidden_size, self.memory_embedding.device
        self.rerank_embedding = nn.Parameter(torch.zeros(width, device=device))
        self.rerank_head = nn.Linear(width, 1, device=device)
        nn.init.zeros_(self.rerank_head.weight)
        nn.init.zeros_(self.rerank_head.bias)

    # ------------------------------------------------------------------ building and loading

    @classmethod
    def from_base(
        cls,
        config: SoftRAGConfig,
        *,
        dtype: torch.dtype = torch.float32,
        frozen_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> SoftRAGModel:
        """Start a new model from the base language models that `config` names.

        Args:
            config: Must name `decoder` and `compressor`.
            dtype: Of trained weights.
            frozen_dtype: Of weights that are never trained; None: the same.
            seed: Of the connector's and adapters' initialisation.

        Raises:
            ValueError: The config names no decoder or no compressor.
        """
        return loading.start(
            cls, config, dtype=dtype, frozen_dtype=frozen_dtype or dtype, seed=seed
        )

    @torch.no_grad()
    def add_rerank_head(self) -> None:
        """Give a query-dependent model a rerank head to train, if it has none yet."""
        if self.config.rerank:
            return
        assert self.compressor is not None
        assert self.compressor_tokenizer is not None
        if not self.config.query_dependent:
            raise ValueError("A rerank head scores documents for a question: set query_dependent.")
        self.config.rerank = True
        self._build_rerank_head()
        words = self.compressor.get_input_embeddings().weight.float()
        self.rerank_embedding.copy_(words.mean(0))
        add_rerank_token(self.compressor_tokenizer)
        self.forget_fingerprint()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        base_model: str | Path | None = None,
        load_decoder: bool = True,
        load_compressor: bool = True,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        revision: str | None = None,
        rate: int | None = None,
    ) -> SoftRAGModel:
        """Load a trained model from a folder or from the hub.

        Args:
            pretrained_model_name_or_path: A folder written by `save_pretrained`, or its hub name.
            base_model: Where the decoder's base model is, when not where the checkpoint says; also
                the compressor's, where it has the same one.
            load_decoder: False leaves out what only answering needs.
            load_compressor: False leaves out what only indexing needs.
            dtype: Of all weights, also by its name. `"auto"`: bfloat16 on a GPU; on a CPU float32
                for the decoder, and bfloat16 for a separate compressor where the CPU is fast at it.
            device: Where to; None: the first GPU, else the CPU.
            revision: Of a hub checkpoint.
            rate: Document tokens per soft token, one of those the checkpoint was trained at; None
                for its own. Memories of different rates have different fingerprints.

        Raises:
            CheckpointError: A file is missing, damaged or of another kind, or the base model is
                not the one the checkpoint was trained on.
            ValueError: The checkpoint was not trained at this rate.
        """
        folder = checkpoint.locate(pretrained_model_name_or_path, revision=revision)
        return loading.load(
            cls,
            layouts.open_source(folder, base_model=base_model),
            load_decoder=load_decoder,
            load_compressor=load_compressor,
            dtype=dtype,
            device=choose_device(device),
            rate=rate,
        )

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        storage: str = "full",
        max_shard_size: int = 14_700_000,
        push_to_hub: bool = False,
        repo_id: str | None = None,
    ) -> None:
        """Write what was trained (adapters, connector, compressor), tokenizers and config.

        Base models are named, not copied.

        Args:
            save_directory: Created when missing.
            storage: `"full"` keeps trained weights as they are; `"int8"` and `"int4"` round
                adapters, and the differences of trained base weights to the base, to so many bits,
                and all else to bfloat16.
            max_shard_size: Bytes of one safetensors file, before its header.
            push_to_hub: Upload the folder afterwards.
            repo_id: Hub name for the upload.

        Raises:
            ValueError: `storage` is unknown, or `push_to_hub` lacks a `repo_id`.
        """
        folder = Path(save_directory)
        checkpoint.save(self, folder, storage=storage, max_shard_size=max_shard_size)
        if push_to_hub:
            if repo_id is None:
                raise ValueError("push_to_hub needs a repo_id, such as 'user/my-softrag-model'.")
            checkpoint.upload(folder, repo_id)

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Return every tensor that differs from the base models, by the name it is saved as."""
        return {name: parameter.detach() for name, parameter in trained_parameters(self).items()}

    def learned_names(self) -> set[str]:
        """Return the names of the tensors of `trained_state` that training moves."""
        return set(self.trained_state()).difference(FIXED_WEIGHTS)

    @property
    def fingerprint(self) -> str:
        """Of everything that decides a memory's values, 32 hex digits.

        Computed from the weights, once per loaded model; `forget_fingerprint` after training.
        """
        if self._fingerprint is None:
            if self.compressor is None:
                if self.config.fingerprint is None:
                    raise ValueError("The model has no compressor and its config no fingerprint.")
                return self.config.fingerprint
            self._fingerprint = fingerprint_of(self)
        return self._fingerprint

    @fingerprint.setter
    def fingerprint(self, known: str) -> None:
        self._fingerprint = known

    def forget_fingerprint(self) -> None:
        """Compute the fingerprint anew when it is next asked for: the weights have changed."""
        self._fingerprint = None

    def merge_adapters(self) -> SoftRAGModel:
        """Fold LoRA into the base weights, for inference; a backbone that is shared is copied."""
        _ = self.fingerprint if self.compressor is not None else None
        for part in self._language_models():
            merge_lora(part.base_model)
        return self

    def fuse_compressor(self, batch_tokens: int) -> None:
        """Let `compress` run fused on a GPU from now on, where gradients are off.

        Args:
            batch_tokens: Tokens of a full batch, which is captured as a CUDA graph.
        """
        if self.compressor is None or self._fused_compressor is not None:
            return
        reason = why_not_fused(self.compressor)
        if reason:
            logger.info("the compressor runs eagerly: %s", reason)
            return
        self._fused_compressor = PackedRunner(
            FusedBackbone(self.compressor),
            width=batch_tokens,
            capture=self.device.type == "cuda",
        )

    # ------------------------------------------------------------------ tensors

    @property
    def memory_ids(self) -> list[int]:
        """Token ids of the memory tokens in the compressor's inputs."""
        names = self.config.memory_token_names
        return [_token_id(self.compressor_tokenizer, name) for name in names]

    @property
    def decoder_memory_ids(self) -> list[int]:
        """Token ids of the memory tokens in the decoder's inputs."""
        names = self.config.memory_token_names
        return [_token_id(self.decoder_tokenizer, name) for name in names]

    @property
    def rerank_id(self) -> int:
        """Token id of `<RR>` in the compressor's inputs."""
        return _token_id(self.compressor_tokenizer, RERANK_TOKEN)

    @property
    def auto_encoding_id(self) -> int:
        """Token id of `<AE>` in the decoder's inputs."""
        return _token_id(self.decoder_tokenizer, AUTO_ENCODING_TOKEN)

    def compress(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Turn documents into soft tokens.

        Args:
            input_ids: `(documents, tokens)` with as many `<MEM>` per row as the row gets soft
                tokens; rows may differ.
            attention_mask: `(documents, tokens)`, 1 for real tokens; any side may be padded.

        Returns:
            `(soft tokens of all rows in order, decoder hidden)`.
        """
        return self.compress_and_score(input_ids, attention_mask).soft_tokens

    def compress_and_score(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> Compressed:
        """Turn documents into soft tokens, and score them with the rerank head if there is one.

        Args:
            input_ids: As in `compress`; for a model with a rerank head, with one `<RR>` per row.
            attention_mask: As in `compress`.
        """
        packed = pack(attention_mask)
        return self.compress_packed(input_ids.flatten()[packed.slot], packed)

    def compress_packed(self, ids: torch.Tensor, packed: Packed) -> Compressed:
        """Do what `compress_and_score` does, for documents without padding.

        Args:
            ids: `(T,)` of all documents, one after the other. On the CPU it spares the host from
                waiting for a GPU: what depends on the ids is found out there.
            packed: Where each document stands, on the same device.
        """
        read = self.read_documents(ids, packed)
        soft_tokens = self.connector(read.memory)
        if read.words is not None and self.config.adds_words:
            soft_tokens = soft_tokens + self.word_projection(read.words)
        scores = None
        if read.rerank is not None:
            # Not a matrix product: autocast would round it.
            weight = self.rerank_head.weight[0].float()
            scores = (read.rerank.float() * weight).sum(-1) + self.rerank_head.bias.float()
        return Compressed(soft_tokens, scores)

    def read_documents(self, ids: torch.Tensor, packed: Packed) -> Read:
        """Return the compressor's states of documents; arguments as in `compress_packed`."""
        if self.compressor is None:
            raise ValueError("The compressor was not loaded; use load_compressor=True.")
        rerank = self.config.rerank
        placeholders = Placeholders.find(
            ids,
            packed,
            memory_ids=self.memory_ids,
            rerank_id=self.rerank_id if rerank else None,
            windows=self.config.readout != "memory",
        )
        return read_documents(
            self._run_compressor,
            self.compressor.get_input_embeddings(),
            placeholders.to(self.compressor.device),
            packed.to(self.compressor.device),
            memory_embedding=self.memory_embedding,
            rerank_embedding=self.rerank_embedding if rerank else None,
            pooled=self.config.readout == "pooled",
        )

    @torch.no_grad()
    def calibrate_connector(self, ids: torch.Tensor, packed: Packed) -> None:
        """Measure, on documents, the states that a standardized connector is to expect.

        Args:
            ids: `(T,)` of the documents, as in `compress_packed`.
            packed: Where each document stands.

        Raises:
            ValueError: The connector is of another kind, or the documents have one soft token.
        """
        if not isinstance(self.connector, StandardizedConnector):
            raise ValueError(
                f"The connector is {type(self.connector).__name__}, which measures nothing; "
                "calibrate one with connector='standardized' and a connector_hidden."
            )
        self.connector.calibrate(self.read_documents(ids, packed).memory)
        self.forget_fingerprint()

    def _run_compressor(
        self, embeddings: torch.Tensor, packed: Packed, position: torch.Tensor
    ) -> torch.Tensor:
        fused = self._fused_compressor
        if fused is not None and not torch.is_grad_enabled():
            return fused(embeddings, packed.cu_seq_lens, packed.max_length, position)
        assert self.compressor is not None
        return run_rows(self.compressor, embeddings, packed, position)

    def embed_prompt(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, soft_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Embed prompts with soft tokens at their `<MEM>` placeholders, in order.

        Args:
            input_ids: `(batch, tokens)`, on any device.
            attention_mask: `(batch, tokens)`; a placeholder that is masked out is not one.
            soft_tokens: `(memory, decoder hidden)` for all rows in order.

        Returns:
            `(batch, tokens, decoder hidden)`.

        Raises:
            PlaceholderMismatchError: The placeholders are not as many as the soft tokens.
        """
        if self.decoder is None:
            raise ValueError("The decoder was not loaded; use load_decoder=True.")
        is_memory, _ = find_tokens(input_ids, self.decoder_memory_ids)
        is_memory = is_memory & attention_mask.bool()
        is_auto_encoding = input_ids == self.auto_encoding_id
        at_memory = is_memory.flatten().nonzero().squeeze(1)
        if len(at_memory) != len(soft_tokens):
            raise PlaceholderMismatchError(
                f"The prompts hold {len(at_memory)} {MEMORY_TOKEN} placeholders, but there are "
                f"{len(soft_tokens)} soft tokens. Lay the prompts out with the number of soft "
                "tokens that each document's memory has."
            )
        device = soft_tokens.device
        words = send(torch.where(is_memory | is_auto_encoding, 0, input_ids), device)
        embeddings = in_compute_dtype(self.decoder.get_input_embeddings()(words))
        special = self.auto_encoding_embedding.to(embeddings.dtype)
        embeddings = torch.where(send(is_auto_encoding, device)[..., None], special, embeddings)
        soft_tokens = soft_tokens.to(embeddings.dtype)
        flat = embeddings.flatten(0, 1).index_copy(0, send(at_memory, device), soft_tokens)
        return flat.view_as(embeddings)

    def forward(
        self,
        decoder_input_ids: torch.Tensor,
        decoder_attention_mask: torch.Tensor,
        compressor_input_ids: torch.Tensor | None = None,
        compressor_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        document_index: torch.Tensor | None = None,
        soft_tokens: torch.Tensor | None = None,
        label_weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        soft_token_labels: torch.Tensor | None = None,
    ) -> SoftRAGOutput:
        """Compress the documents and read the prompts.

        Ids, masks, labels and `document_index` are best left on the CPU: what follows from them is
        found out there, and the host never waits for a GPU.

        Args:
            decoder_input_ids: `(batch, tokens)` prompts with `<MEM>` placeholders.
            decoder_attention_mask: `(batch, tokens)`.
            compressor_input_ids: `(documents, tokens)`; None when no prompt has placeholders.
            compressor_attention_mask: `(documents, tokens)`.
            labels: `(batch, tokens)`, -100 where nothing is learned.
            document_index: `(uses,)` which compressed document fills which placeholders, in
                order, when a document is used more than once; None: each once, in order.
            soft_tokens: `(memory, decoder hidden)` to read in the place of compressed documents.
            label_weights: `(batch, tokens)` what each label weighs in the loss; None: 1.
            num_items_in_batch: What the labels of the whole (accumulated) batch weigh together, to
                average over; None: those of this call.
            soft_token_labels: `(memory,)` the token that the decoder's head is to read off each
                soft token, in the order of the placeholders, or `(memory, words)` several, each as
                likely; -100 where it may be any, or there are no more. A document that is used
                twice says its tokens twice.

        Returns:
            With labels: their mean loss, and logits of the labelled positions only,
            `(labels, vocabulary)`: the others would cost most of the memory and serve nothing.
            Without: logits `(batch, tokens, vocabulary)`.
            `scores` of the compressed documents, from a model with a rerank head.
        """
        if self.decoder is None:
            raise ValueError("The decoder was not loaded; use load_decoder=True.")
        scores = None
        if soft_tokens is None:
            soft_tokens, scores = self._compress_and_line_up(
                compressor_input_ids, compressor_attention_mask, document_index
            )
        packed = pack(decoder_attention_mask)
        # The real tokens as one row: padding is not even embedded.
        row = decoder_input_ids.flatten()[packed.slot][None]
        embeddings = self.embed_prompt(row, torch.ones_like(row), soft_tokens)[0]
        device = embeddings.device
        on_device = packed.to(device)
        states = run_rows(self.decoder.base_model, embeddings, on_device, on_device.position)
        head = self.decoder.get_output_embeddings()
        if labels is None:
            padded = states.new_zeros((decoder_input_ids.numel(), states.shape[-1]))
            padded = padded.index_copy(0, on_device.slot, states)
            logits = head(padded).view(*decoder_input_ids.shape, -1)
            return SoftRAGOutput(logits=logits, scores=scores)
        # A state predicts the next token of its row; the last one of a row predicts nothing.
        targets = labels.flatten()[packed.slot].roll(-1)
        targets[packed.cu_seq_lens[1:].long() - 1] = IGNORED
        learned = (targets != IGNORED).nonzero().squeeze(1)
        logits = head(states.index_select(0, send(learned, device)))
        weights = None
        if label_weights is not None:
            weights = label_weights.flatten()[packed.slot].roll(-1)[learned]
        items: torch.Tensor | float | None = num_items_in_batch
        if items is None:
            items = len(learned) if weights is None else float(weights.sum())
        loss = self._loss(
            logits,
            send(targets[learned], device),
            None if weights is None else send(weights, device),
        )
        said_loss = None
        if soft_token_labels is not None:
            several = soft_token_labels.dim() > 1
            wanted = soft_token_labels if several else soft_token_labels[:, None]
            saying = (wanted != IGNORED).any(1).nonzero().squeeze(1)
            said = in_compute_dtype(soft_tokens.index_select(0, send(saying, device)))
            said_loss = self._said_loss(head(said), send(wanted[saying], device))
        return SoftRAGOutput(loss=loss / items, logits=logits, scores=scores, said_loss=said_loss)

    @torch.no_grad()
    def generate(
        self, inputs: Mapping[str, torch.Tensor], *, max_new_tokens: int = 128
    ) -> list[str]:
        """Compress, then answer greedily.

        Args:
            inputs: `compressor_input_ids` and `compressor_attention_mask` `(documents, tokens)`,
                `decoder_input_ids` and `decoder_attention_mask` `(batch, tokens)`, the latter
                padded on the left.
            max_new_tokens: The longest answer.

        Returns:
            One answer per prompt.
        """
        if self.decoder is None or self.decoder_tokenizer is None:
            raise ValueError("The decoder was not loaded; use load_decoder=True.")
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        soft_tokens = self.compress(
            inputs["compressor_input_ids"], inputs["compressor_attention_mask"]
        )
        mask = inputs["decoder_attention_mask"]
        ids = self.decoder.generate(
            inputs_embeds=self.embed_prompt(inputs["decoder_input_ids"], mask, soft_tokens),
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        return self.decoder_tokenizer.batch_decode(ids, skip_special_tokens=True)

    def line_up_soft_tokens(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        document_index: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compress a batch's distinct documents and line them up as the prompts use them.

        Args:
            input_ids: `(documents, tokens)`, or None for no documents.
            attention_mask: `(documents, tokens)`, or None.
            document_index: `(uses,)` as in `forward`.

        Returns:
            `(memory, decoder hidden)`, one row per placeholder.
        """
        return self._compress_and_line_up(input_ids, attention_mask, document_index).soft_tokens

    def _compress_and_line_up(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        document_index: torch.Tensor | None,
    ) -> Compressed:
        if input_ids is None or attention_mask is None:
            nothing = self.auto_encoding_embedding.new_zeros((0, len(self.auto_encoding_embedding)))
            return Compressed(nothing, None)
        compressed = self.compress_and_score(input_ids, attention_mask)
        if document_index is None:
            return compressed
        is_memory, _ = find_tokens(input_ids, self.memory_ids)
        counts = (is_memory & attention_mask.bool()).sum(dim=1)
        order = send(expand_spans(counts, document_index), compressed.soft_tokens.device)
        return Compressed(compressed.soft_tokens.index_select(0, order), compressed.scores)

    # ------------------------------------------------------------------ training

    def _language_models(self) -> Iterator[LanguageModel]:
        for part in (self.compressor, self.decoder):
            if part is not None:
                yield part

    def compile_layers(self) -> None:
        """Compile transformer layers and losses for any number of tokens (CUDA training)."""
        for part in self._language_models():
            for layer in part.base_model.layers:
                # Its forward alone, so that hooks see what comes out.
                layer.forward = torch.compile(layer.forward, dynamic=True)
        # Uncompiled, the logits are kept three times over in float32.
        self._loss = torch.compile(_summed_loss, dynamic=True)
        self._said_loss = torch.compile(_summed_said_loss, dynamic=True)


def _summed_loss(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Return the summed cross entropy of `(tokens, vocabulary)` logits, weighed."""
    if weights is None:
        return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    # Not a product of vectors: autocast would round it.
    return (nn.functional.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()


def _summed_said_loss(logits: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of each row of `(n, vocabulary)` logits, summed.

    Args:
        logits: `(n, vocabulary)`.
        words: `(n, words)` what each row says, one token at least; -100 where there are no more.
    """
    known = words != IGNORED
    losses = -logits.float().log_softmax(-1).gather(1, words.clamp_min(0))
    return (losses * known).sum(1).div(known.sum(1)).sum()


def _token_id(tokenizer: PreTrainedTokenizerBase | None, token: str) -> int:
    if tokenizer is None:
        raise ValueError(
            "The model has no tokenizers; load it with from_pretrained or build it with from_base."
        )
    return token_id(tokenizer, token)


AutoModel.register(SoftRAGConfig, SoftRAGModel, exist_ok=True)
