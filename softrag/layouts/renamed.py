"""Tensors of a foreign checkpoint under the names they have in a `SoftRAGModel`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from softrag.config import SoftRAGConfig
from softrag.errors import CheckpointError
from softrag.prompt import token_id
from softrag.weights import StoredTensor

_LORA = re.compile(r"^(?:base_model\.model\.)?(.+\.lora_[AB])(?:\.\w+)?\.weight$")


class Renamed(dict[str, StoredTensor]):
    """Tensors under softrag's names; no two may have the same."""

    def add(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add tensors by their new names.

        Raises:
            CheckpointError: A name is there already.
        """
        for name, tensor in tensors.items():
            if name in self:
                raise CheckpointError(f"{path} holds {name} twice. Restore the file.")
            self[name] = StoredTensor(name, tensor, path)

    def add_lora(
        self, path: Path, part: str, tensors: Mapping[str, torch.Tensor], *, drop: str = ""
    ) -> None:
        """Add an adapter's weights: saved without its name, loaded as peft's default adapter."""
        for name, tensor in tensors.items():
            lora = _LORA.match(name)
            renamed = f"{lora[1].removeprefix(drop)}.default.weight" if lora else name
            self.add(path, {part + renamed: tensor})

    def add_connector(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add the connector's weights: two linear layers of a `Sequential`, the ReLU between."""
        layers = {"0": "up", "2": "down"}
        for name, tensor in tensors.items():
            layer, _, kind = name.partition(".")
            self.add(path, {f"connector.{layers.get(layer, layer)}.{kind}": tensor})


def checked_rows(path: Path, embeddings: torch.Tensor, expected: int) -> torch.Tensor:
    """Return embeddings that have a row for every token.

    Raises:
        CheckpointError: They have more or fewer.
    """
    if embeddings.ndim != 2 or len(embeddings) != expected:
        raise CheckpointError(
            f"The embeddings in {path} are {tuple(embeddings.shape)}, but the base model's "
            f"tokenizer has {expected} tokens with the checkpoint's own. The base model is another "
            "one; give the right one as base_model=."
        )
    return embeddings


def memory_rows(
    embeddings: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    config: SoftRAGConfig,
) -> torch.Tensor:
    """Return the embeddings of the memory tokens, `(distinct, hidden)` or `(hidden,)`."""
    ids = [token_id(tokenizer, name) for name in config.memory_token_names]
    return embeddings[ids] if config.distinct_memory_tokens else embeddings[ids[0]]
