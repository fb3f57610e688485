"""How a comparison looks on a terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from softrag.comparison import Calibration, Comparison, Interval, Row, examples

EXAMPLES = 3
PIPE_WIDTH = 160


def print_comparison(comparison: Comparison) -> None:
    """Print a row per way of answering, and where memories lose what text has."""
    console = _console()
    n = len(comparison.questions)
    table = Table(title=f"{n} questions", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", style="bold")
    metrics = list(comparison.rows[0].scores)
    for metric in metrics:
        table.add_column(metric.replace("_", "-"), justify="right", no_wrap=True)
        if metric == "f1":
            table.add_column("95 %", style="dim", no_wrap=True)
            table.add_column("to text", style="dim", no_wrap=True)
    for name in ("prompt tokens", "compress ms", "answer ms", "bytes/document"):
        table.add_column(name, justify="right")
    for row in comparison.rows:
        table.add_row(*_cells(comparison, row, metrics))
    console.print(table)
    for row in comparison.rows:
        if row.mode == "memory" and comparison.text_of(row) is not None:
            _print_lost(console, comparison, row)


def print_calibration(calibration: Calibration, file: Path | None) -> None:
    """Print what a router is worth, and where it is."""
    mean, low, high = calibration.recovered
    gap = f": {mean:.0%} of the gap [{low:.0%}, {high:.0%}]" if calibration.has_gap else ""
    _console().print(
        f"\nFallback, tested on questions the router had not seen: with "
        f"{calibration.from_text.mean():.0%} of them answered from text, quality goes from "
        f"{calibration.memory.mean:.1f} to {calibration.routed.mean:.1f} (text alone "
        f"{calibration.text.mean:.1f}){gap}.\nThe router is in {file}; "
        f"use it with --fallback {file}.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _cells(comparison: Comparison, row: Row, metrics: list[str]) -> list[str]:
    cells = [row.name if row.text_share is None else f"{row.name} ({row.text_share:.0%} text)"]
    for metric in metrics:
        interval = comparison.interval(row, metric)
        cells.append(f"{interval.mean:.1f}")
        if metric == "f1":
            against = comparison.against_text(row, metric)
            cells.append(f"[{interval.low:.1f}, {interval.high:.1f}]")
            cells.append("" if against is None else _difference(against))
    return [
        *cells,
        f"{np.mean(row.prompt_tokens):.0f}",
        f"{1000 * row.compress_s:.2f}",
        f"{1000 * row.decode_s:.2f}",
        f"{row.stored_bytes:,.0f}",
    ]


def _difference(interval: Interval) -> str:
    return f"{interval.mean:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"


def _print_lost(console: Console, comparison: Comparison, row: Row) -> None:
    lost = comparison.lost(row)
    n = len(comparison.questions)
    console.print(
        f"\nText is right and {row.name} wrong on {len(lost)} of {n} questions "
        f"({len(lost) / n:.1%}).",
        markup=False,
        highlight=False,
    )
    for question, accepted, text, answer in examples(comparison, row, EXAMPLES):
        console.print(
            Text.assemble(
                ("  ", ""),
                (question, "bold"),
                f" {accepted}\n    text: ",
                (text, "green"),
                f"\n    {row.name}: ",
                (answer, "red"),
            ),
            soft_wrap=True,
        )


def _console() -> Console:
    console = Console()
    # A pipe has no width of its own, and a squeezed table no use.
    return console if console.is_terminal else Console(width=PIPE_WIDTH)
