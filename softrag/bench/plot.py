"""Results as a picture: latency by documents, throughput by batch."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softrag.bench.measure import Result
from softrag.extras import load_extra

FIRST_TOKEN = re.compile(r"(\w+), (\d+) documents, batch 1: first token")
ANSWERS = re.compile(r"(\w+), \d+ documents, batch (\d+): answers")


def save_plot(results: Sequence[Result], path: Path) -> None:
    """Draw what `bench_single` and `bench_batch` measured.

    Args:
        results: Theirs, among others.
        path: Of the picture; its ending chooses the format.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    # Without pyplot, which keeps figures and chooses a window system.
    library = load_extra("matplotlib.figure", extra="eval", purpose="A plot")
    figure = library.Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, results, FIRST_TOKEN, scale=1000.0)
    left.set(xlabel="documents", ylabel="time to first token (ms)", ylim=(0, None))
    _draw(right, results, ANSWERS, scale=1.0)
    right.set(xlabel="batch", ylabel="answers per second", ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.savefig(path)


def _draw(axes: Any, results: Sequence[Result], name: re.Pattern[str], *, scale: float) -> None:  # noqa: ANN401
    lines: defaultdict[str, list[tuple[int, float, float | None]]] = defaultdict(list)
    for result in results:
        found = name.fullmatch(result.name)
        if found:
            lines[found[1]].append((int(found[2]), result.value, result.floor))
    for mode, points in lines.items():
        places, values, floors = zip(*sorted(points), strict=True)
        (drawn,) = axes.plot(places, [scale * v for v in values], marker="o", label=mode)
        axes.plot(
            places, [scale * (f or 0) for f in floors],
            linestyle=":", color=drawn.get_color(), label=f"{mode}, hardware limit",
        )  # fmt: skip
