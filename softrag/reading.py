"""Documents through the compressor: what its states say at their memory and rerank tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from softrag.packing import Packed
from softrag.placeholders import Placeholders

# (embeddings, rows, position ids) -> states, as `softrag.packing.run_rows` of some backbone.
Run = Callable[[torch.Tensor, Packed, torch.Tensor], torch.Tensor]


class Read(NamedTuple):
    """What the compressor's states say of documents; all tensors are `(n, hidden)`.

    Attributes:
        memory: States of all `<MEM>` tokens.
        words: The mean embeddings of their windows, or pooled ones; None where there are no
            windows.
        rerank: States of all `<RR>` tokens; None from models without a rerank head.
    """

    memory: torch.Tensor
    words: torch.Tensor | None
    rerank: torch.Tensor | None


def read_documents(
    run: Run,
    embed: nn.Module,
    at: Placeholders,
    packed: Packed,
    *,
    memory_embedding: torch.Tensor,
    rerank_embedding: torch.Tensor | None,
    pooled: bool = False,
) -> Read:
    """Run a compressor over packed documents.

    Args:
        run: Runs its backbone.
        embed: Its word embeddings.
        at: The documents, and where their memory tokens stand.
        packed: Where each document stands.
        memory_embedding: `(hidden,)` of every memory token, or `(memory tokens, hidden)`.
        rerank_embedding: `(hidden,)` of the rerank token; None without one.
        pooled: Return `words` as sums over the root of their number, instead of means.
    """
    embeddings = in_compute_dtype(embed(at.words))
    width, dtype = embeddings.shape[-1], embeddings.dtype
    if at.rerank is not None and rerank_embedding is not None:
        rerank = rerank_embedding.to(dtype).expand(len(at.rerank), -1)
        embeddings = embeddings.index_copy(0, at.rerank, rerank)
    memory = memory_embedding.to(dtype).view(-1, width)
    # One token's gradient is a plain sum; picked by index, it would be added up row by row.
    memory = memory[at.which] if len(memory) > 1 else memory.expand(len(at.which), -1)
    position, words = packed.position, None
    if at.windows is not None:
        words = at.windows.mean(embeddings[at.text])
        memory = memory + words
        position = position.index_copy(0, at.memory, at.windows.end)
    states = run(embeddings.index_copy(0, at.memory, memory), packed, position)
    memory = states.index_select(0, at.memory)
    if at.windows is not None:
        assert at.text is not None
        memory = memory + at.windows.mean(states.index_select(0, at.text))
        if pooled and words is not None:
            words = words * at.windows.count.to(words.dtype).sqrt()[:, None]
    at_rerank = None if at.rerank is None else states.index_select(0, at.rerank)
    return Read(memory, words, at_rerank)


def in_compute_dtype(embeddings: torch.Tensor) -> torch.Tensor:
    """Autocast rounds matrix products only; start the residual stream in its dtype."""
    kind = embeddings.device.type
    if torch.is_autocast_enabled(kind):
        return embeddings.to(torch.get_autocast_dtype(kind))
    return embeddings
