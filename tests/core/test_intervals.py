"""What intervals promise: repeatable, as wide as theory says, and sharper in pairs."""

from __future__ import annotations

import numpy as np
import pytest

from softrag.comparison import Bootstrap


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).normal(size=50)

    assert Bootstrap(50, seed=3).interval(values) == Bootstrap(50, seed=3).interval(values)
    assert Bootstrap(50, seed=3).interval(values) != Bootstrap(50, seed=4).interval(values)


def test_an_interval_is_as_wide_as_the_normal_approximation():
    values = np.repeat([0.0, 100.0], 200)

    mean, low, high = Bootstrap(400, resamples=5000).interval(values)

    half = 1.96 * 50 / np.sqrt(400)
    assert mean == 50.0
    assert (low, high) == pytest.approx((50 - half, 50 + half), abs=0.3)


def test_a_paired_difference_is_not_blurred_by_hard_questions():
    text = np.random.default_rng(0).choice([0.0, 100.0], size=300)
    memory = text.copy()
    memory[:10] = 0.0
    bootstrap = Bootstrap(300)

    difference = bootstrap.interval(memory - text)

    widths = [high - low for _, low, high in (difference, bootstrap.interval(text))]
    assert difference.high <= 0.0
    assert widths[0] < widths[1] / 3


def test_a_ratio_of_means_is_taken_on_the_same_resamples():
    whole = np.random.default_rng(0).uniform(50, 100, size=80)

    ratio = Bootstrap(80).ratio(whole / 4, whole)

    assert tuple(ratio) == pytest.approx((0.25, 0.25, 0.25))
    assert np.isnan(Bootstrap(80).ratio(whole, np.zeros(80)).mean)


def test_no_questions_have_no_interval():
    with pytest.raises(ValueError, match="at least one question"):
        Bootstrap(0)
