"""Language models that read memories: vLLM's own classes, with image embeddings let in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageEmbeddingItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptIndexTargets,
    PromptInsertion,
)

_MAX_MEMORY_TOKENS = 256
# Stands at the soft tokens' places; what it is does not matter, because nobody reads it.
_FILLER_ID = 0


class MemoryInfo(BaseProcessingInfo):
    """How many memories a prompt may hold, and how long they may be."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return None for any number; `--limit-mm-per-prompt` says how many."""
        return {"image": None}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Return the soft tokens of the longest memory."""
        return {"image": self.max_memory_tokens}

    @property
    def max_memory_tokens(self) -> int:
        """Soft tokens of the longest memory."""
        config = self.ctx.model_config.hf_config
        return int(getattr(config, "softrag_max_memory_tokens", _MAX_MEMORY_TOKENS))


class MemoryDummies(BaseDummyInputsBuilder[MemoryInfo]):
    """The largest input, for vLLM to measure its memory by."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Return no text: memories are put before it."""
        return ""

    def get_dummy_mm_data(
        self,
        seq_len: int,
        mm_counts: Mapping[str, int],
        mm_options: Mapping[str, object],
    ) -> dict[str, list[torch.Tensor]]:
        """Return memories of zeros."""
        width = self.info.ctx.model_config.get_hidden_size()
        memory = torch.zeros(self.info.max_memory_tokens, width)
        return {"image": [memory] * mm_counts.get("image", 0)}


class MemoryProcessor(BaseMultiModalProcessor[MemoryInfo]):
    """Passes memories through; there is nothing to compute."""

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"image_embeds": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptInsertion]:
        # For vLLM's own measurements only: the client lays prompts out itself.
        memories = mm_items.get_items("image", ImageEmbeddingItems)
        return [
            PromptInsertion(
                modality="image",
                target=PromptIndexTargets.start(),
                insertion=lambda item: [_FILLER_ID] * memories.get_feature_size(item),
            )
        ]


class ReadsMemories:
    """What makes a language model read memories.

    Stands before vLLM's class among the bases. `SupportsMultiModal` stands behind it: a protocol's
    constructor calls no other.
    """

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return None: no text stands for a memory."""
        return None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Build the language model as it is: the weights keep their names."""
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.configure_mm_token_handling(self.config.vocab_size, [_FILLER_ID])

    def embed_multimodal(self, **kwargs: object) -> list[torch.Tensor]:
        """Return the memories, `(memory, hidden)` each."""
        embeddings = kwargs.get("image_embeds")
        if embeddings is None:
            return []
        dtype = self.model.embed_tokens.weight.dtype
        # The client refuses what is not finite. Should another send it, its own answer is spoilt,
        # not those of others who share the cache.
        return [
            torch.nan_to_num(memory.to(dtype), nan=0.0, posinf=0.0, neginf=0.0)
            for memory in embeddings
        ]

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor] | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed the words and put the memories at their places."""
        return SupportsMultiModal.embed_input_ids(
            self, input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )


_registered = MULTIMODAL_REGISTRY.register_processor(
    MemoryProcessor, info=MemoryInfo, dummy_inputs=MemoryDummies
)


@_registered
class SoftRAGLlamaForCausalLM(ReadsMemories, LlamaForCausalLM, SupportsMultiModal):
    """Llama and what is built like it."""


@_registered
class SoftRAGMistralForCausalLM(ReadsMemories, MistralForCausalLM, SupportsMultiModal):
    """Mistral."""


@_registered
class SoftRAGQwen2ForCausalLM(ReadsMemories, Qwen2ForCausalLM, SupportsMultiModal):
    """Qwen2 and Qwen2.5."""


@_registered
class SoftRAGQwen3ForCausalLM(ReadsMemories, Qwen3ForCausalLM, SupportsMultiModal):
    """Qwen3."""
