"""Choosing tokens on the device. It knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from softrag.packing import send


def choose(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Return one token per row: the likeliest at temperature 0, else one drawn from its weights.

    What is drawn depends on the row's own seed and count alone, so neighbours in a batch change
    nothing: the Gumbel-max trick with noise that is a hash of seed, count and token.

    Args:
        logits: `(rows, vocabulary)`.
        temperature: `(rows,)`.
        seeds: `(rows,)` int64.
        counts: `(rows,)` int64, another for every token of a row.

    Returns:
        `(rows,)` int64.
    """
    cold = temperature <= 0
    scaled = logits.float() / torch.where(cold, 1.0, temperature)[:, None]
    token = torch.arange(logits.shape[1], device=logits.device)
    start = _mix(_mix(seeds) + counts)  # (rows,)
    bits = (_mix(start[:, None] + token) >> 40) & 0xFFFFFF  # (rows, vocabulary), 24 bits
    noise = -torch.log(-torch.log((bits.float() + 0.5) / 2**24))
    return torch.where(cold[:, None], scaled, scaled + noise).argmax(-1)


def log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities, `(rows,)`, of `(rows,)` tokens in `(rows, vocabulary)`."""
    wide = logits.float()
    return wide.gather(-1, tokens[:, None])[:, 0] - wide.logsumexp(-1)


class Biases(NamedTuple):
    """What is added to some logits before a token is chosen.

    Attributes:
        rows: Whose logits, each row once.
        tokens: Which of them, `(n,)` of each row.
        values: What is added, of each row.
    """

    rows: Sequence[int]
    tokens: Sequence[np.ndarray]
    values: Sequence[float]

    def write(self, into: torch.Tensor) -> None:
        """Put the values in their places of `(rows, vocabulary)` logits to add."""
        vocabulary = into.shape[1]
        # Some tokenizers have tokens that no model writes.
        tokens = [each[each < vocabulary] for each in self.tokens]
        counts = torch.tensor([len(each) for each in tokens])
        rows = torch.tensor(self.rows).repeat_interleave(counts)
        values = torch.tensor(self.values, dtype=into.dtype).repeat_interleave(counts)
        where = torch.stack([rows, torch.from_numpy(np.concatenate(tokens))])
        places = send(where, into.device)
        into[places[0], places[1]] = send(values, into.device)

    def added_to(self, logits: torch.Tensor) -> torch.Tensor:
        """Return `(rows, vocabulary)` logits with these values added."""
        if not self.rows:
            return logits
        added = torch.zeros_like(logits)
        self.write(added)
        return logits + added


NO_BIASES = Biases((), (), ())


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble int64 numbers (the finalizer of splitmix64; products wrap around)."""
    x = (x + -7046029254386353131).clone()
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
