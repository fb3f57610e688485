"""Fitting a router on answered questions, and what it is worth on questions it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from softrag.comparison.intervals import Bootstrap, Interval
from softrag.decoder import DecodeResult
from softrag.extras import load_extra
from softrag.router import LOOKAHEAD, N_WITHOUT_STATE, Router, features


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A router with its measured worth.

    The scores are out of sample: each half of the questions is scored by a router fitted on the
    other half.

    Attributes:
        router: Fitted on all questions.
        scores: `(questions,)`, of routers that had not seen the question, in percent.
        from_text: `(questions,)`, whether those routers answer from text.
        memory: Mean quality of memories alone, in percent.
        text: Mean quality of text alone.
        routed: Mean quality with the fallback.
        recovered: Part of the gap between memory and text that the fallback closes; 1.0 is all.
        gain: `(questions,)`, what text is better by.
    """

    router: Router
    scores: np.ndarray
    from_text: np.ndarray
    memory: Interval
    text: Interval
    routed: Interval
    recovered: Interval
    gain: np.ndarray

    @property
    def has_gap(self) -> bool:
        """Whether text is better on average, so that `recovered` says something."""
        return self.text.mean > self.memory.mean

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Return shares of questions from text, 0 to 1, and the mean quality at each."""
        ordered = self.gain[np.argsort(-self.scores, kind="stable")]
        gained = np.concatenate([[0.0], np.cumsum(ordered)]) / len(ordered)
        return np.linspace(0, 1, len(gained)), self.memory.mean + gained


def calibrate(
    results: Sequence[DecodeResult],
    *,
    questions: Sequence[str],
    texts: Sequence[Sequence[str]],
    memory: np.ndarray,
    text: np.ndarray,
    fingerprint: str,
    budget: float = 0.2,
    lookahead: int = LOOKAHEAD,
    with_state: bool = True,
    seed: int = 0,
) -> Calibration:
    """Fit a router for a budget of answers from text, and measure it on held-out halves.

    Args:
        results: Answers from memories, with token log-probabilities, openings of `lookahead`
            tokens and, unless `with_state` is false, prompt states.
        questions: What was asked.
        texts: Of the documents that were read, for each question.
        memory: Quality of those answers, `(questions,)` in percent.
        text: Quality of the answers from text.
        fingerprint: Of the compressor.
        budget: Most questions to answer from text, as a share between 0 and 1.
        lookahead: As in `Router`.
        with_state: As in `Router`.
        seed: Of the split into halves and of the intervals.

    Raises:
        ValueError: There are too few questions, or text never answers better.
        MissingExtraError: scikit-learn is not installed.
    """
    if not 0 < budget < 1:
        raise ValueError(f"budget must be between 0 and 1, found {budget}.")
    gain = np.asarray(text, dtype=float) - memory  # (questions,)
    if min((gain > 0).sum(), (gain <= 0).sum()) < 10:
        raise ValueError(
            f"Of {len(gain)} questions, text answers {(gain > 0).sum()} better than memory and "
            f"{(gain <= 0).sum()} not; a router needs 10 of each at least. Calibrate on more."
        )
    looks = np.stack(
        [
            features(result, question, read, lookahead=lookahead, with_state=with_state)
            for result, question, read in zip(results, questions, texts, strict=True)
        ]
    )
    order = np.random.default_rng(seed).permutation(len(gain))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    scores = np.zeros(len(gain))
    from_text = np.zeros(len(gain), dtype=bool)
    for fitted, tested in (halves, halves[::-1]):
        weights, bias = _fit(looks[fitted], gain[fitted])
        # The threshold too comes from the other half: what is spent here is not set, but found.
        threshold = _threshold(looks[fitted] @ weights + bias, budget)
        scores[tested] = looks[tested] @ weights + bias
        from_text[tested] = scores[tested] >= threshold
    weights, bias = _fit(looks, gain)
    bootstrap = Bootstrap(len(gain), seed=seed)
    return Calibration(
        router=Router(
            fingerprint=fingerprint,
            threshold=_threshold(looks @ weights + bias, budget),
            lookahead=lookahead,
            weights=[float(weight) for weight in weights],
            bias=bias,
            with_state=with_state,
        ),
        scores=scores,
        from_text=from_text,
        memory=bootstrap.interval(memory),
        text=bootstrap.interval(text),
        routed=bootstrap.interval(np.where(from_text, text, memory)),
        recovered=bootstrap.ratio(np.where(from_text, gain, 0.0), gain),
        gain=gain,
    )


def _fit(looks: np.ndarray, gain: np.ndarray) -> tuple[np.ndarray, float]:
    """Return weights and bias of a ridge regression of what text is better by.

    To rank questions by the expected gain is what spends a budget best. The strength of the penalty
    is the one that leave-one-out errors favour; it is a hundredth for what is not the state, whose
    hundreds of values would drown the few others.
    """
    linear: Any = load_extra("sklearn.linear_model", extra="eval", purpose="Calibration")
    mean, scale = looks.mean(0), looks.std(0) + 1e-6
    scale[:N_WITHOUT_STATE] /= 10
    model = linear.RidgeCV(alphas=np.logspace(0, 6, 13))
    model.fit((looks - mean) / scale, gain)
    weights = model.coef_ / scale
    return weights, float(model.intercept_ - mean @ weights)


def _threshold(scores: np.ndarray, budget: float) -> float:
    # Where text is not expected to gain anything, a budget need not be spent.
    return max(0.0, float(np.quantile(scores, 1 - budget)))
