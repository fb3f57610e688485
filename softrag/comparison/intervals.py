"""Bootstrap confidence intervals of means and of their differences. It knows numbers only.

Percentile bootstrap over questions (Efron and Tibshirani, 1993, chapter 13). All means share one
set of resamples, so a difference of two of them is the paired bootstrap: it is not blurred by what
makes a question hard for both.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Percentiles of the resamples' means: the ends of a 95% interval.
_TAILS = (2.5, 97.5)


class Interval(NamedTuple):
    """A mean with its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float


class Bootstrap:
    """Resamples a number of questions, the same way for every mean.

    Args:
        n: Number of questions.
        seed: Makes the intervals repeatable.
        resamples: How many times the questions are drawn anew.
    """

    def __init__(self, n: int, *, seed: int = 0, resamples: int = 2000) -> None:
        if n < 1:
            raise ValueError(f"Intervals need at least one question, found {n}.")
        # How often each question was drawn says all of a resample, and makes a mean one product.
        draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
        self._weights = draws.astype(np.float32) / n  # (resamples, questions)

    def interval(self, values: np.ndarray) -> Interval:
        """Return the mean of `(questions,)` values and its interval; of a difference, pass that."""
        means = self._weights @ np.asarray(values, dtype=np.float32)
        low, high = np.percentile(means, _TAILS)
        return Interval(float(np.mean(values)), float(low), float(high))

    def ratio(self, part: np.ndarray, whole: np.ndarray) -> Interval:
        """Return the mean of one over the mean of another, both `(questions,)`, and its interval.

        Resamples whose whole is zero say nothing and are left out.
        """
        parts, wholes = (self._weights @ np.asarray(v, dtype=np.float32) for v in (part, whole))
        ratios = parts[wholes != 0] / wholes[wholes != 0]
        if not len(ratios) or not np.mean(whole):
            return Interval(float("nan"), float("nan"), float("nan"))
        low, high = np.percentile(ratios, _TAILS)
        return Interval(float(np.mean(part) / np.mean(whole)), float(low), float(high))
