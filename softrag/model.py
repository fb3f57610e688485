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
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import CausalLMOutput

from softrag import checkpoint, layouts
from softrag.adapters import add_lora, is_lora_weight, merge_lora
from softrag.backbones import (
    LanguageModel,
    choose_dtypes,
    embeddings_name,
    empty_compressor,
    give_vocabulary,
    keep_layers,
    load_base,
    load_tokenizer,
    share_backbone,
)
from softrag.base_models import quiet_loading, resolve_base_model, shape_of
from softrag.batch import IGNORED
from softrag.config import SoftRAGConfig
from softrag.errors import CheckpointError, PlaceholderMismatchError
from softrag.fused import FusedBackbone, PackedRunner, why_not_fused
from softrag.packing import PACKED_ATTENTION, Packed, can_pack, pack, run_packed, send
from softrag.prompt import (
    AUTO_ENCODING_TOKEN,
    MEMORY_TOKEN,
    RERANK_TOKEN,
    add_rerank_token,
    token_id,
)
from softrag.windows import Windows, expand_spans, find_tokens

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
    """A causal language model's output, with the `scores` of `Compressed`."""

    scores: torch.Tensor | None = None


class Connector(nn.Module):
    """Two linear layers with ReLU between (OSCAR, table 7): compressor states to soft tokens."""

    def __init__(self, in_features: int, hidden: int, out_features: int) -> None:
        """Make the layers; `match_scale` sets the output's size."""
        super().__init__()
        self.up = nn.Linear(in_features, hidden)
        self.down = nn.Linear(hidden, out_features)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map `(memory, in_features)` to `(memory, out_features)`."""
        return self.down(nn.functional.relu(self.up(states)))

    @torch.no_grad()
    def match_scale(self, states: torch.Tensor, rms: float) -> None:
        """Scale the output for these input states to a root mean square.

        Soft tokens that are several times larger or smaller than token embeddings make the first
        steps of training a fight against the decoder.
        """
        factor = rms / self(states).float().pow(2).mean().sqrt().clamp_min(1e-12)
        self.down.weight.mul_(factor)
        self.down.bias.mul_(factor)


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
        self._embeddings_name: str | None = None
        if decoder is None and (load_decoder or config.shares_backbone):
            decoder = AutoModelForCausalLM.from_config(config.sub_config("decoder"))
        if decoder is not None:
            give_vocabulary(decoder, config.decoder_vocabulary)
            self._embeddings_name = f"decoder.{embeddings_name(decoder)}"
        if load_compressor and compressor is None:
            compressor = (
                share_backbone(decoder)
                if config.shares_backbone and decoder is not None
                else AutoModel.from_config(config.sub_config("compressor"))
            )
        if compressor is not None:
            if not config.shares_backbone:
                give_vocabulary(compressor, config.compressor_vocabulary)
            if config.compressor_layers is not None:
                keep_layers(compressor, config.compressor_layers)
            if not config.compressor_norm:
                compressor.norm = nn.Identity()
        self.decoder = decoder if load_decoder else None
        self.compressor = compressor if load_compressor else None
        self.compressor_tokenizer: PreTrainedTokenizerBase | None = None
        self.decoder_tokenizer: PreTrainedTokenizerBase | None = None
        self._fingerprint: str | None = None
        self._loss = _summed_loss
        self._fused_compressor: PackedRunner | None = None

        decoder_width = config.sub_config("decoder").hidden_size
        if self.compressor is not None:
            width = self.compressor.config.hidden_size
            self._prepare_backbone(self.compressor)
            # One for all memory tokens, or one each.
            distinct = (config.memory_tokens,) if config.distinct_memory_tokens else ()
            self.memory_embedding = nn.Parameter(torch.zeros(*distinct, width))
            self.connector: nn.Module = (
                nn.Identity()
                if config.connector_hidden is None
                else Connector(width, config.connector_hidden, decoder_width)
            )
            if config.readout == "words":
                self.word_projection = nn.Linear(width, decoder_width, bias=False)
            if config.connector_hidden is None and width != decoder_width:
                raise ValueError(
                    f"Without a connector the compressor's width ({width}) must be the decoder's "
                    f"({decoder_width}); set connector_hidden."
                )
            if config.rerank:
                self._build_rerank_head()
        if self.decoder is not None:
            self._prepare_backbone(self.decoder)
            self.auto_encoding_embedding = nn.Parameter(torch.zeros(decoder_width))
        self._freeze_and_adapt()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave weights alone: the base models and peft initialise their own."""

    def _build_rerank_head(self) -> None:
        assert self.compressor is not None
        width, device = self.compressor.config.hidden_size, self.memory_embedding.device
        self.rerank_embedding = nn.Parameter(torch.zeros(width, device=device))
        self.rerank_head = nn.Linear(width, 1, device=device)
        nn.init.zeros_(self.rerank_head.weight)
        nn.init.zeros_(self.rerank_head.bias)

    def _prepare_backbone(self, model: LanguageModel) -> None:
        backbone = model.base_model
        if can_pack(backbone):
            model.set_attn_implementation(PACKED_ATTENTION)
        else:
            logger.info("%s can't be packed; batches are padded", type(backbone).__name__)

    def _freeze_and_adapt(self) -> None:
        """Freeze the base vocabulary and what adapters stand in for; add the adapters."""
        config = self.config
        if self.decoder is not None:
            # The base weights never change: with adapters they are learned beside them,
            # without, the decoder is frozen.
            self.decoder.requires_grad_(False)
            if config.decoder_lora is not None:
                add_lora(self.decoder.base_model, **config.decoder_lora)
        if self.compressor is not None:
            if config.compressor_lora is not None:
                self.compressor.requires_grad_(False)
                add_lora(self.compressor, **config.compressor_lora)
            elif config.shares_backbone:
                raise ValueError(
                    "A compressor that shares the decoder's backbone learns through adapters: "
                    "set compressor_lora."
                )
            self.compressor.get_input_embeddings().requires_grad_(False)

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
        if config.decoder is None or config.compressor is None:
            raise ValueError(
                f"from_base needs both base models; got decoder={config.decoder!r} and "
                f"compressor={config.compressor!r}."
            )
        frozen = frozen_dtype or dtype
        decoder_path = resolve_base_model(config.decoder)
        with quiet_loading():
            decoder = AutoModelForCausalLM.from_pretrained(decoder_path, dtype=frozen)
        config.decoder_config = shape_of(decoder.config)
        compressor_path, compressor = decoder_path, None
        if not config.shares_backbone:
            compressor_path = resolve_base_model(config.compressor)
            kept = frozen if config.compressor_lora is not None else dtype
            with quiet_loading():
                compressor = AutoModel.from_pretrained(compressor_path, dtype=kept)
            config.compressor_config = shape_of(compressor.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(config, decoder, compressor)
            model.compressor_tokenizer = load_tokenizer(compressor_path, config)
            if config.rerank:
                add_rerank_token(model.compressor_tokenizer)
            model.decoder_tokenizer = load_tokenizer(decoder_path, config)
            model._initialise_new_weights()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        return model

    @torch.no_grad()
    def _initialise_new_weights(self) -> None:
        assert self.compressor is not None
        assert self.decoder is not None
        # The mean embedding is in-distribution for every base model; zeros are not.
        words = self.compressor.get_input_embeddings().weight.float()
        self.memory_embedding.copy_(words.mean(0))
        if self.config.rerank:
            self.rerank_embedding.copy_(words.mean(0))
        embeddings = self.decoder.get_input_embeddings().weight.float()
        self.auto_encoding_embedding.copy_(embeddings.mean(0))
        if self.config.readout == "words":
            # Two models of one family share their words' embeddings; others learn from nothing.
            same = words.shape == embeddings.shape and torch.equal(words, embeddings)
            initialise = nn.init.eye_ if same else nn.init.zeros_
            initialise(self.word_projection.weight)
        if isinstance(self.connector, Connector):
            # Random documents are enough to find the size of the compressor's states.
            ids = torch.randint(0, len(words), (8, 64), device=words.device)
            ids = torch.cat([ids, ids.new_full((8, 4), self.memory_ids[0])], dim=1)
            read = self._read_documents(ids.flatten(), pack(torch.ones_like(ids)))
            # Beside the words' own embeddings the rest starts small.
            share = 0.3 if self.config.readout == "words" else 1.0
            self.connector.match_scale(
                read.memory.to(self.connector.up.weight.dtype),
                share * embeddings.pow(2).mean().sqrt().item(),
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
            dtype: Of all weights. `"auto"`: bfloat16 on a GPU; on a CPU float32 for the decoder,
                and bfloat16 for a separate compressor where the CPU is fast at it.
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
        source = layouts.open_source(folder, base_model=base_model)
        config = source.config
        trained_at = config.rates or [config.rate]
        if rate is not None and (rate not in trained_at or config.memory_tokens is not None):
            raise ValueError(
                f"rate {rate} was asked for, but {folder} was trained "
                + (
                    f"at {', '.join(map(str, trained_at))} document tokens per soft token. Use "
                    "one of them, or train with data.rates."
                    if config.memory_tokens is None
                    else f"for {config.memory_tokens} soft tokens, whatever the document's length."
                )
            )
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        decoder_dtype, compressor_dtype = choose_dtypes(config, dtype, target)
        decoder = compressor = None
        if load_decoder or config.shares_backbone:
            decoder = load_base(AutoModelForCausalLM, source, "decoder", decoder_dtype, target)
        if load_compressor and not config.shares_backbone and not config.stores_compressor:
            # In float32 first: stored differences are added to the base weights before rounding.
            compressor = load_base(
                AutoModel, source, "compressor", torch.float32, torch.device("cpu")
            )
        try:
            if load_compressor and config.stores_compressor:
                compressor = empty_compressor(config, compressor_dtype, target)
            with no_init_weights():  # Whatever is built here is filled below.
                model = cls(
                    config,
                    decoder,
                    compressor,
                    load_decoder=load_decoder,
                    load_compressor=load_compressor,
                )
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / 'config.json'} describes a model that can't be built: {error}"
            ) from error
        model.compressor_tokenizer = source.compressor_tokenizer
        model.decoder_tokenizer = source.decoder_tokenizer
        checkpoint.load_weights(model, source)
        if model.compressor is not None:
            # What decides a memory's values is hashed before any rounding to the target's dtype.
            model._fingerprint = checkpoint.fingerprint(model)
            checkpoint.check_fingerprint(model, folder)
            model.compressor.to(compressor_dtype)
            model.connector.to(compressor_dtype)
            if config.readout == "words":
                model.word_projection.to(compressor_dtype)
            # A rerank head stays in float32, to tell like documents apart.
            model.memory_embedding.data = model.memory_embedding.data.to(compressor_dtype)
        if model.decoder is not None:
            model.decoder.to(decoder_dtype)
            added = model.auto_encoding_embedding
            added.data = added.data.to(decoder_dtype)
        model.to(target)  # type: ignore[arg-type]
        if rate is not None and rate != config.rate:
            model._fingerprint = checkpoint.fingerprint_at_rate(model.fingerprint, rate)
            config.rate = rate
        return model.eval()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        storage: str = "full",
        max_shard_size: int = 14_900_000,
        push_to_hub: bool = False,
        repo_id: str | None = None,
    ) -> None:
        """Write what was trained (adapters, connector, compressor), tokenizers and config.

        Base models are named, not copied.

        Args:
            save_directory: Created when missing.
            storage: `"full"` keeps trained weights as they are; `"int8"` stores adapters and
                connector in bfloat16 and trained base weights as 8-bit differences to the base.
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

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return every parameter that differs from the base models, by the name it is saved as."""
        parameters = {n: p for n, p in self.named_parameters() if self._is_trained(n)}
        if self.config.shares_backbone and self.config.decoder_vocabulary is not None:
            # The decoder's embeddings, though the compressor may be loaded alone.
            assert self._embeddings_name is not None
            backbone = self.compressor if self.decoder is None else self.decoder
            if backbone is not None:
                embeddings = backbone.get_input_embeddings().weight
                parameters = {n: p for n, p in parameters.items() if p is not embeddings}
                parameters[self._embeddings_name] = embeddings
        return parameters

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Return every tensor that differs from the base models, by the name it is saved as."""
        return {name: parameter.detach() for name, parameter in self.trained_parameters().items()}

    def _is_trained(self, name: str) -> bool:
        if name.startswith(checkpoint.COMPRESSOR_WEIGHTS + checkpoint.DECODER_WEIGHTS):
            return True
        if is_lora_weight(name):
            return True
        if name.startswith("compressor."):
            assert self.compressor is not None
            is_vocabulary = (
                self.get_parameter(name) is self.compressor.get_input_embeddings().weight
            )
            if self.config.compressor_lora is None:
                return not is_vocabulary or self.config.compressor_vocabulary is not None
            return is_vocabulary and self.config.compressor_vocabulary is not None
        if self.config.decoder_vocabulary is None:
            return False
        assert self.decoder is not None
        ends = (self.decoder.get_input_embeddings(), self.decoder.get_output_embeddings())
        return any(self.get_parameter(name) is end.weight for end in ends)

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
            self._fingerprint = checkpoint.fingerprint(self)
        return self._fingerprint

    def forget_fingerprint(self) -> None:
        """Compute the fingerprint anew when it is next asked for: the weights have changed."""
        self._fingerprint = None

    def merge_adapters(self) -> SoftRAGModel:
        """Fold LoRA into the base weights, for inference; a backbone that is shared is copied."""
        _ = self.fingerprint if self.compressor is not None else None
        for part in (self.compressor, self.decoder):
            if part is not None:
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
        read = self._read_documents(ids, packed)
        soft_tokens = self.connector(read.memory)
        if read.words is not None:
            soft_tokens = soft_tokens + self.word_projection(read.words)
        scores = None
        if read.rerank is not None:
            # Not a matrix product: autocast would round it.
            weight = self.rerank_head.weight[0].float()
            scores = (read.rerank.float() * weight).sum(-1) + self.rerank_head.bias.float()
        return Compressed(soft_tokens, scores)

    def _read_documents(self, ids: torch.Tensor, packed: Packed) -> _Read:
        """Run the compressor over `(T,)` ids."""
        if self.compressor is None:
            raise ValueError("The compressor was not loaded; use load_compressor=True.")
        device = self.compressor.device
        is_memory, which = find_tokens(ids, self.memory_ids)
        is_text = ~is_memory
        at_rerank = None
        if self.config.rerank:
            is_rerank = ids == self.rerank_id
            is_text &= ~is_rerank
            at_rerank = send(is_rerank.nonzero().squeeze(1), device)
        at_memory = is_memory.nonzero().squeeze(1)
        windows = at_text = None
        if self.config.readout != "memory":
            at_text = is_text.nonzero().squeeze(1)
            windows = Windows.of(packed, is_memory, at_text, at_memory).to(device)
            at_text = send(at_text, device)
        which = send(which[at_memory], device)
        packed, at_memory = packed.to(device), send(at_memory, device)
        words = self.compressor.get_input_embeddings()
        # Ids of added tokens lie behind the base vocabulary; any word will do in their place.
        embeddings = words(send(torch.where(is_text, ids, 0), device))
        embeddings = embeddings.to(self._compute_dtype(embeddings))
        if at_rerank is not None:
            rerank = self.rerank_embedding.to(embeddings.dtype).expand(len(at_rerank), -1)
            embeddings = embeddings.index_copy(0, at_rerank, rerank)
        memory = self.memory_embedding.to(embeddings.dtype).view(-1, embeddings.shape[-1])
        memory = memory[which]
        if windows is None or at_text is None:
            embeddings = embeddings.index_copy(0, at_memory, memory)
            states = self._run(self.compressor, embeddings, packed, packed.position)
            return _Read(states[at_memory], None, _at(states, at_rerank))
        mean = windows.mean(embeddings[at_text])
        embeddings = embeddings.index_copy(0, at_memory, memory + mean)
        position = packed.position.index_copy(0, at_memory, windows.end)
        states = self._run(self.compressor, embeddings, packed, position)
        memory = states[at_memory] + windows.mean(states[at_text])
        words_read = mean if self.config.readout == "words" else None
        return _Read(memory, words_read, _at(states, at_rerank))

    def embed_prompt(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, soft_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Embed prompts with soft tokens at their `<MEM>` placeholders, in order.

        Args:
            input_ids: `(batch, tokens)`.
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
        added = is_memory | is_auto_encoding
        embeddings = self.decoder.get_input_embeddings()(torch.where(added, 0, input_ids))
        embeddings = embeddings.to(self._compute_dtype(embeddings))
        special = self.auto_encoding_embedding.to(embeddings.dtype)
        embeddings = torch.where(is_auto_encoding[..., None], special, embeddings)
        flat = embeddings.flatten(0, 1).index_copy(0, at_memory, soft_tokens.to(embeddings.dtype))
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
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> SoftRAGOutput:
        """Compress the documents and read the prompts.

        Args:
            decoder_input_ids: `(batch, tokens)` prompts with `<MEM>` placeholders.
            decoder_attention_mask: `(batch, tokens)`.
            compressor_input_ids: `(documents, tokens)`; None when no prompt has placeholders.
            compressor_attention_mask: `(documents, tokens)`.
            labels: `(batch, tokens)`, -100 where nothing is learned.
            document_index: `(uses,)` which compressed document fills which placeholders, in
                order, when a document is used more than once; None: each once, in order.
            soft_tokens: `(memory, decoder hidden)` to read in the place of compressed documents.
            num_items_in_batch: Labels in the whole (accumulated) batch, to average over; None:
                those of this call.

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
        embeddings = self.embed_prompt(decoder_input_ids, decoder_attention_mask, soft_tokens)
        packed = pack(decoder_attention_mask)
        states = self._run(
            self.decoder.base_model, embeddings.flatten(0, 1)[packed.slot], packed, packed.position
        )
        head = self.decoder.get_output_embeddings()
        if labels is None:
            padded = states.new_zeros((decoder_input_ids.numel(), states.shape[-1]))
            padded = padded.index_copy(0, packed.slot, states)
            logits = head(padded).view(*decoder_input_ids.shape, -1)
            return SoftRAGOutput(logits=logits, scores=scores)
        # A state predicts the next token of its row; the last one of a row predicts nothing.
        targets = labels.flatten()[packed.slot].roll(-1)
        targets[packed.cu_seq_lens[1:].long() - 1] = IGNORED
        learned = (targets != IGNORED).nonzero().squeeze(1)
        logits = head(states[learned])
        loss = self._loss(logits, targets[learned])
        items = len(learned) if num_items_in_batch is None else num_items_in_batch
        return SoftRAGOutput(loss=loss / items, logits=logits, scores=scores)

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

    def _run(
        self,
        backbone: LanguageModel,
        embeddings: torch.Tensor,
        packed: Packed,
        position: torch.Tensor,
    ) -> torch.Tensor:
        """Run a backbone over the real tokens; `(T, hidden)` to `(T, hidden)`."""
        fused = self._fused_compressor
        if backbone is self.compressor and fused is not None and not torch.is_grad_enabled():
            return fused(embeddings, packed.cu_seq_lens, packed.max_length, position)
        if backbone.config._attn_implementation == PACKED_ATTENTION:
            return run_packed(backbone, embeddings, packed, position)
        shape = (len(packed.lengths), packed.max_length)
        slot = packed.row * packed.max_length + packed.position
        padded = embeddings.new_zeros((shape[0] * shape[1], embeddings.shape[-1]))
        positions = slot.new_zeros(shape).flatten().index_copy(0, slot, position)
        output = backbone(
            inputs_embeds=padded.index_copy(0, slot, embeddings).view(*shape, -1),
            attention_mask=(
                torch.arange(shape[1], device=slot.device) < packed.lengths[:, None]
            ).long(),
            position_ids=positions.view(shape),
            use_cache=False,
        )
        return output.last_hidden_state.flatten(0, 1)[slot]

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
            nothing = self.auto_encoding_embedding.new_zeros((0, self._decoder_width))
            return Compressed(nothing, None)
        compressed = self.compress_and_score(input_ids, attention_mask)
        if document_index is None:
            return compressed
        is_memory, _ = find_tokens(input_ids, self.memory_ids)
        counts = (is_memory & attention_mask.bool()).sum(dim=1)
        used = compressed.soft_tokens[expand_spans(counts, document_index)]
        return Compressed(used, compressed.scores)

    def _compute_dtype(self, embeddings: torch.Tensor) -> torch.dtype:
        """Autocast rounds matrix products only; start the residual stream in its dtype."""
        kind = embeddings.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return embeddings.dtype

    @property
    def _decoder_width(self) -> int:
        return self.auto_encoding_embedding.shape[0]

    # ------------------------------------------------------------------ training

    def language_models(self) -> Iterator[LanguageModel]:
        """Yield the loaded compressor and decoder."""
        for part in (self.compressor, self.decoder):
            if part is not None:
                yield part

    def compile_layers(self) -> None:
        """Compile each transformer layer and the loss for any number of tokens (CUDA training)."""
        for part in self.language_models():
            for layer in part.base_model.layers:
                layer.compile(dynamic=True)
        # Uncompiled, the logits are kept three times over in float32.
        self._loss = torch.compile(_summed_loss, dynamic=True)


def _summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed cross entropy of `(tokens, vocabulary)` logits."""
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


class _Read(NamedTuple):
    """What the compressor's states say of documents; all tensors are `(n, hidden)`.

    Attributes:
        memory: States of all `<MEM>` tokens.
        words: With readout `"words"`, the mean embeddings of their windows; else None.
        rerank: States of all `<RR>` tokens; None from models without a rerank head.
    """

    memory: torch.Tensor
    words: torch.Tensor | None
    rerank: torch.Tensor | None


def _at(states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor | None:
    return None if index is None else states[index]


def _token_id(tokenizer: PreTrainedTokenizerBase | None, token: str) -> int:
    if tokenizer is None:
        raise ValueError(
            "The model has no tokenizers; load it with from_pretrained or build it with from_base."
        )
    return token_id(tokenizer, token)


AutoModel.register(SoftRAGConfig, SoftRAGModel, exist_ok=True)
