"""Relevance of documents to their question: what is learned, and how well. It knows no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def rerank_loss(scores: torch.Tensor, relevance: torch.Tensor) -> torch.Tensor:
    """Return the summed binary cross entropy of the documents whose relevance is known.

    The relevance may be a gold label (0 or 1) or a cross-encoder's probability (distillation).

    Args:
        scores: `(documents,)` logits.
        relevance: `(documents,)` from 0 to 1; NaN where nobody said.

    >>> rerank_loss(torch.tensor([0.0, 9.0]), torch.tensor([1.0, float("nan")]))
    tensor(0.6931)
    """
    known = ~relevance.isnan()
    losses = nn.functional.binary_cross_entropy_with_logits(
        scores, relevance.nan_to_num(), reduction="none"
    )
    # Zero where nothing is known, but still a function of the scores: several processes wait for
    # the gradient of every weight that was used.
    return (losses * known).sum()


def score_reranking(
    scores: Sequence[Sequence[float]], gold: Sequence[Sequence[bool]]
) -> dict[str, float]:
    """Return `rerank_accuracy` (a gold document comes first) and `rerank_mrr`, in percent.

    Questions whose documents are all gold, or none, say nothing and are left out. Ties count
    against the gold document.

    >>> score_reranking([[0.1, 0.9, 0.5]], [[False, False, True]])
    {'rerank_accuracy': 0.0, 'rerank_mrr': 50.0}
    """
    ranks: list[int] = []
    for values, flags in zip(scores, gold, strict=True):
        if any(flags) and not all(flags):
            pairs = list(zip(values, flags, strict=True))
            best = max(value for value, is_gold in pairs if is_gold)
            ranks.append(1 + sum(value >= best for value, is_gold in pairs if not is_gold))
    if not ranks:
        return {}
    return {
        "rerank_accuracy": 100 * sum(rank == 1 for rank in ranks) / len(ranks),
        "rerank_mrr": 100 * sum(1 / rank for rank in ranks) / len(ranks),
    }
