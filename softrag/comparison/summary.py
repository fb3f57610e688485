"""A comparison as plain values, for JSON, tables and reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from softrag.comparison.calibration import Calibration
from softrag.comparison.intervals import Interval
from softrag.comparison.rows import Comparison, Row


def summarize(comparison: Comparison) -> dict[str, Any]:
    """Return means, intervals and answers as JSON can hold them.

    Every row has its means by metric; `intervals` and `against_text` hold `[low, high]` and
    `[difference, low, high]`, `lost` what text answers right and this row wrong.
    """
    return {
        "questions": len(comparison.questions),
        "seed": comparison.seed,
        "modes": {row.name: _row(comparison, row) for row in comparison.rows},
        "answers": [
            {
                "id": question.id,
                "question": question.question,
                "answers": list(question.answers),
                **{row.name: row.results[place].text for row in comparison.rows},
                "scores": {
                    row.name: {name: float(scores[place]) for name, scores in row.scores.items()}
                    for row in comparison.rows
                },
            }
            for place, question in enumerate(comparison.questions)
        ],
    }


def by_source(comparison: Comparison, metric: str) -> Mapping[str, Mapping[str, float]]:
    """Return a metric's mean by the questions' data set, then by row."""
    sources = np.array([question.source for question in comparison.questions])
    return {
        source: {
            row.name: float(row.scores[metric][sources == source].mean()) for row in comparison.rows
        }
        for source in dict.fromkeys(sources.tolist())
    }


def summarize_calibration(calibration: Calibration) -> dict[str, Any]:
    """Return what a router is worth, out of sample, as JSON can hold it."""
    return {
        "text_share": float(calibration.from_text.mean()),
        "memory": list(calibration.memory),
        "text": list(calibration.text),
        "routed": list(calibration.routed),
        "recovered": list(calibration.recovered) if calibration.has_gap else None,
        "threshold": calibration.router.threshold,
        "lookahead": calibration.router.lookahead,
        "with_state": calibration.router.with_state,
    }


def _row(comparison: Comparison, row: Row) -> dict[str, Any]:
    intervals = {name: comparison.interval(row, name) for name in row.scores}
    against = {name: comparison.against_text(row, name) for name in row.scores}
    lost = comparison.lost(row)
    results = row.results
    return {
        **{name: interval.mean for name, interval in intervals.items()},
        "prompt_tokens": float(row.prompt_tokens.mean()),
        "completion_tokens": float(np.mean([result.completion_tokens for result in results])),
        "compress_s": row.compress_s,
        "decode_s": row.decode_s,
        "stored_bytes": row.stored_bytes,
        "text_share": row.text_share,
        "copy_bias": row.copy_bias,
        "intervals": {name: _bounds(interval) for name, interval in intervals.items()},
        "against_text": {
            name: list(difference) for name, difference in against.items() if difference is not None
        },
        "lost": {
            "share": len(lost) / len(comparison.questions),
            "ids": [comparison.questions[place].id for place in lost],
        },
    }


def _bounds(interval: Interval) -> list[float]:
    return [interval.low, interval.high]
