"""What a decode engine elsewhere reads: checked prompts, and their embeddings.

It needs the decoder's tokenizer and token embeddings, never its layers. It knows no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from softrag import checkpoint as checkpoints
from softrag.base_models import quiet_loading, resolve_base_model
from softrag.decoder.checks import check_memory
from softrag.errors import CheckpointError, NonFiniteMemoryError
from softrag.memory import Memory
from softrag.prompt import RagPrompt


class BuiltPrompt(NamedTuple):
    """One prompt, ready to be embedded.

    Attributes:
        input_ids: With `<MEM>` at the soft tokens' places.
        memories: What fills those places, in order.
    """

    input_ids: list[int]
    memories: list[Memory]

    @property
    def soft_tokens(self) -> int:
        """How many of the tokens are soft."""
        return sum(map(len, self.memories))


@dataclass(frozen=True, kw_only=True)
class PromptBuilder:
    """Checks memories and lays prompts out as the checkpoint was trained on them.

    Attributes:
        prompt: The layout.
        fingerprint: Of the compressor whose memories the decoder reads.
        width: Of a soft token; the decoder's hidden size.
        canonical_order: Whether documents stand in the order of their content instead of best
            first, so that the same set is the same prompt, whose beginning an engine may have
            cached. It changes answers a little: only for decoders trained on shuffled documents.
    """

    prompt: RagPrompt
    fingerprint: str
    width: int
    canonical_order: bool = False

    @classmethod
    def from_pretrained(
        cls, checkpoint: str | Path, *, canonical_order: bool = False
    ) -> PromptBuilder:
        """Read a checkpoint's layout and tokenizer, and no weights.

        Raises:
            CheckpointError: The checkpoint is damaged or was never saved with its fingerprint.
        """
        folder = checkpoints.locate(checkpoint)
        config = checkpoints.read_config(folder)
        if config.fingerprint is None:
            raise CheckpointError(
                f"The config.json in {folder} has no fingerprint. Save the model again with "
                "SoftRAGModel.save_pretrained."
            )
        tokenizer = checkpoints.read_tokenizer(folder, "decoder_tokenizer")
        return cls(
            prompt=RagPrompt.from_config(config, tokenizer),
            fingerprint=config.fingerprint,
            width=config.sub_config("decoder").hidden_size,
            canonical_order=canonical_order,
        )

    def build(self, question: str, documents: Sequence[Memory | str]) -> BuiltPrompt:
        """Check the memories and lay out one question.

        Raises:
            MemoryMismatchError: A memory belongs to another model.
            NonFiniteMemoryError: A memory holds NaN or infinity.
        """
        built = self.lay_out(question, documents)
        for memory in built.memories:
            check_memory(memory, fingerprint=self.fingerprint, width=self.width)
        return built

    def lay_out(self, question: str, documents: Sequence[Memory | str]) -> BuiltPrompt:
        """Lay out one question without looking into its memories."""
        if self.canonical_order:
            documents = sorted(documents, key=_content)
        row = self.prompt.render(
            question,
            [len(document) if isinstance(document, Memory) else document for document in documents],
        )
        memories = [document for document in documents if isinstance(document, Memory)]
        return BuiltPrompt(row.input_ids, memories)

    def load_embeddings(self, decoder: str | Path | None = None) -> PromptEmbeddings:
        """Load the decoder's token embeddings, and nothing else of it.

        Args:
            decoder: As in `PromptEmbeddings.from_pretrained`; None for the checkpoint's base model.

        Raises:
            ValueError: The checkpoint brings embeddings of its own, which the base model lacks.
        """
        if decoder is None and self.prompt.config.decoder_vocabulary is not None:
            raise ValueError(
                "This checkpoint's decoder has embeddings of its own. Export it first "
                "(softrag convert --merge, or softrag.export.export_decoder) and give its folder."
            )
        return PromptEmbeddings.from_pretrained(
            decoder or str(self.prompt.config.decoder), memory_ids=self.prompt.memory_ids
        )


class PromptEmbeddings:
    """Embeds prompts with the decoder's token embeddings.

    Args:
        layer: The decoder's input embeddings.
        memory_ids: Token ids of the memory tokens in prompts.
    """

    def __init__(self, layer: nn.Module, *, memory_ids: Sequence[int]) -> None:
        # A layer that scales (Gemma) does so in the precision it is kept in.
        self._layer = layer if type(layer) is nn.Embedding else layer.float()
        self._memory_ids = torch.tensor(memory_ids)

    @classmethod
    def from_pretrained(cls, decoder: str | Path, *, memory_ids: Sequence[int]) -> PromptEmbeddings:
        """Read the embeddings of a language model, in the dtype they are stored in.

        Args:
            decoder: Folder or name of the decoder, exported or base: adapters never change the
                embeddings.
            memory_ids: Token ids of the memory tokens in prompts.
        """
        path = resolve_base_model(str(decoder))
        config = AutoConfig.from_pretrained(path)
        # A model without layers is its embeddings; only their weights are read.
        config.num_hidden_layers = 0
        if getattr(config, "layer_types", None):
            config.layer_types = []
        with quiet_loading():
            model = AutoModel.from_pretrained(path, config=config, dtype="auto")
        return cls(model.get_input_embeddings().requires_grad_(False), memory_ids=memory_ids)

    @torch.no_grad()
    def embed(self, built: BuiltPrompt) -> torch.Tensor:
        """Return `(tokens, hidden)` with the soft tokens at their places.

        On the CPU, in storage of its own, and in a dtype that rounds neither words nor memories.

        Raises:
            NonFiniteMemoryError: The result holds NaN or infinity.
        """
        ids = torch.tensor(built.input_ids)
        is_memory = torch.isin(ids, self._memory_ids)
        # They may lie behind the base vocabulary; any word will do in its place.
        embeddings = self._layer(torch.where(is_memory, 0, ids))
        if built.memories:
            soft_tokens = torch.cat([memory.values for memory in built.memories])
            dtype = torch.promote_types(embeddings.dtype, soft_tokens.dtype)
            embeddings = embeddings.to(dtype)
            embeddings[is_memory] = soft_tokens.to(dtype)
        if not torch.isfinite(embeddings).all():
            raise NonFiniteMemoryError(
                "The decoder's token embeddings hold NaN or infinity, so nothing was sent. Check "
                "the base model's files."
            )
        return embeddings.contiguous()


def _content(document: Memory | str) -> str:
    return document.key if isinstance(document, Memory) else document
