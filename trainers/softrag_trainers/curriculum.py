"""Rates that rise while a model learns: the easiest memories come first.

At a high rate a new compressor and its decoder learn from each other only when either has learned
something. At rate 2 soft tokens are nearly words; both start there, and go on.
"""

from __future__ import annotations

import torch

from softrag.config import SoftRAGConfig


class Curriculum:
    """The rates that lessons are drawn from, by how much of a run is done.

    The stages are the powers of two below the model's highest rate and the rates it is trained at,
    in order and evenly over their share of the run. In the second half of a stage the next one's
    rate is as likely. A rate of the model's that was reached stays: a model trained on towards a
    higher one forgets what it read at a lower.

    Args:
        config: The model's.
        share: Of the run in which the rate rises, more than 0 and at most 1.

    Raises:
        ValueError: The share is none, or the model has no rate.
    """

    def __init__(self, config: SoftRAGConfig, share: float) -> None:
        if not 0 < share <= 1:
            raise ValueError(
                f"optimizer.curriculum is {share}; expected a share of the run, from 0 to 1."
            )
        if config.memory_tokens is not None:
            raise ValueError(
                f"optimizer.curriculum is {share}, but every document has {config.memory_tokens} "
                "soft tokens (memory_tokens) and there is no rate to rise. Set arch.memory_tokens="
                "null, or optimizer.curriculum=0."
            )
        self.share = share
        self.wanted = sorted(set(config.rates or [config.rate]))
        highest = self.wanted[-1]
        doubling = {2**power for power in range(1, highest.bit_length())}
        self.stages = sorted(doubling | set(self.wanted))
        # The processes that make batches see what the one that trains writes.
        self._done = torch.zeros(1, dtype=torch.float64).share_memory_()

    @property
    def done(self) -> float:
        """How much of the run is done, 0 to 1."""
        return float(self._done)

    @done.setter
    def done(self, share: float) -> None:
        self._done.fill_(share)

    def rates(self) -> list[int]:
        """Return the rates that a lesson is drawn from now, each as likely."""
        last = len(self.stages) - 1
        place = self.done / self.share * last
        stage = min(int(place), last)
        rising = self.stages[stage : stage + (2 if place - stage >= 0.5 else 1)]
        return [rate for rate in self.wanted if rate < rising[0]] + rising
