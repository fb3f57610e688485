"""A comparison on one HTML page that needs nothing else: plots are inside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from softrag.comparison.calibration import Calibration
from softrag.comparison.rows import Comparison, Row
from softrag.comparison.summary import by_source, summarize, summarize_calibration
from softrag.extras import load_extra

EXAMPLES = 20

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>softrag: {{ title }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
         color: #222 }
  table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
  th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
  th:first-child, td:first-child, .words td { text-align: left; vertical-align: top }
  small { color: #666; white-space: nowrap }
  img { max-width: 100% }
</style>
<h1>{{ title }}</h1>
<p>{{ summary.questions }} questions. Scores in percent with 95 % bootstrap intervals (seed
{{ summary.seed }}); below them the difference to text, on the same questions. Seconds are per
question, answered in batches.</p>
<table>
<tr><th></th>{% for metric in metrics %}<th>{{ metric }}</th>{% endfor %}
<th>prompt tokens</th><th>compress s</th><th>answer s</th><th>bytes a document</th></tr>
{% for name, row in summary.modes.items() %}
<tr><td>{{ name }}</td>
{% for metric in metrics %}<td>{{ "%.1f" | format(row[metric]) }}
<small>[{{ "%.1f" | format(row.intervals[metric][0]) }},
{{ "%.1f" | format(row.intervals[metric][1]) }}]</small>
{% if metric in row.against_text %}<br><small>{{ "%+.1f" | format(row.against_text[metric][0]) }}
[{{ "%+.1f" | format(row.against_text[metric][1]) }},
{{ "%+.1f" | format(row.against_text[metric][2]) }}]</small>{% endif %}</td>{% endfor %}
<td>{{ "%.0f" | format(row.prompt_tokens) }}</td><td>{{ "%.4f" | format(row.compress_s) }}</td>
<td>{{ "%.4f" | format(row.decode_s) }}</td><td>{{ "{:,.0f}".format(row.stored_bytes) }}</td></tr>
{% endfor %}
</table>
{% for plot in plots %}<p><img alt="{{ plot.caption }}" src="data:image/png;base64,{{ plot.png }}">
<br>{{ plot.caption }}</p>
{% endfor %}
{% if calibration %}
<h2>Fallback</h2>
<p>Tested on questions the router had not seen: with {{ "%.0f" | format(100 *
calibration.text_share) }} % of the questions answered from text, quality goes from
{{ "%.1f" | format(calibration.memory[0]) }} to {{ "%.1f" | format(calibration.routed[0]) }}, where
text alone has {{ "%.1f" | format(calibration.text[0]) }}.{% if calibration.recovered %} That is
{{ "%.0f" | format(100 * calibration.recovered[0]) }} % of the gap.{% endif %}</p>
{% endif %}
{% for row in lost %}
<h2>Where text is right and {{ row.name }} wrong: {{ row.count }} of {{ summary.questions }}
({{ "%.1f" | format(100 * row.count / summary.questions) }} %)</h2>
{% if row.examples %}
<table class="words"><tr><td><b>question</b></td><td><b>accepted</b></td><td><b>text</b></td>
<td><b>{{ row.name }}</b></td></tr>
{% for example in row.examples %}<tr>{% for cell in example %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% if row.count > row.examples | length %}<p>The first {{ row.examples | length }}.</p>{% endif %}
{% endif %}
{% endfor %}
</html>
"""


def write_report(
    comparison: Comparison,
    path: str | Path,
    *,
    title: str,
    calibration: Calibration | None = None,
) -> None:
    """Write the page.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    page = Environment(autoescape=True).from_string(_PAGE)
    html = page.render(
        title=title,
        summary=summarize(comparison),
        metrics=list(comparison.rows[0].scores),
        plots=_plots(comparison, calibration),
        calibration=calibration and summarize_calibration(calibration),
        lost=[
            {
                "name": row.name,
                "count": len(comparison.lost(row)),
                "examples": examples(comparison, row, EXAMPLES),
            }
            for row in comparison.rows
            if row.mode == "memory" and comparison.text_of(row) is not None
        ],
    )
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(html, encoding="utf-8")
    part.replace(path)


def examples(comparison: Comparison, row: Row, n: int) -> list[tuple[str, str, str, str]]:
    """Return question, accepted answers, text's answer and the row's, where text alone is right."""
    text = comparison.text_of(row)
    if text is None:
        return []
    return [
        (
            comparison.questions[place].question,
            " | ".join(comparison.questions[place].answers),
            text.results[place].text,
            row.results[place].text,
        )
        for place in comparison.lost(row)[:n]
    ]


def _plots(comparison: Comparison, calibration: Calibration | None) -> list[dict[str, str]]:
    plots = [
        _scatter(
            comparison,
            comparison.rows,
            [float(row.prompt_tokens.mean()) for row in comparison.rows],
            label="prompt tokens a question",
            caption="Quality against what the decoder reads.",
        )
    ]
    stored = [row for row in comparison.rows if row.stored_bytes > 0]
    if stored:
        plots.append(
            _scatter(
                comparison,
                stored,
                [row.stored_bytes for row in stored],
                label="bytes stored a document (logarithmic)",
                caption="Quality against what is stored.",
                logarithmic=True,
            )
        )
    if len({question.source for question in comparison.questions}) > 1:
        plots.append(_bars(comparison))
    if calibration is not None:
        plots.append(_curve(calibration))
    return plots


def _scatter(
    comparison: Comparison,
    rows: Sequence[Row],
    costs: Sequence[float],
    *,
    label: str,
    caption: str,
    logarithmic: bool = False,
) -> dict[str, str]:
    figure, axes = _figure()
    for row, cost in zip(rows, costs, strict=True):
        mean, low, high = comparison.interval(row, "f1")
        # A percentile interval may, rarely, leave the mean out.
        errors = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
        axes.errorbar([cost], [mean], yerr=errors, fmt="o", capsize=4, label=row.name)
        axes.annotate(row.name, (cost, mean), textcoords="offset points", xytext=(8, 4))
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("F1 in percent")
    axes.margins(x=0.25)
    axes.set_ylim(bottom=0.0)
    return {"caption": caption, "png": _png(figure)}


def _bars(comparison: Comparison) -> dict[str, str]:
    figure, axes = _figure()
    means = by_source(comparison, "f1")
    width = 0.8 / len(comparison.rows)
    for number, row in enumerate(comparison.rows):
        places = np.arange(len(means)) + (number - (len(comparison.rows) - 1) / 2) * width
        axes.bar(places, [each[row.name] for each in means.values()], width, label=row.name)
    axes.set_xticks(np.arange(len(means)), list(means), rotation=15)
    axes.set_ylabel("F1 in percent")
    axes.legend(frameon=False)
    return {"caption": "Quality by data set.", "png": _png(figure)}


def _curve(calibration: Calibration) -> dict[str, str]:
    figure, axes = _figure()
    shares, quality = calibration.curve()
    axes.plot(100 * shares, quality, label="the router's choice")
    ends = [calibration.memory.mean, calibration.text.mean]
    axes.plot([0, 100], ends, linestyle="--", color="grey", label="chosen at random")
    axes.set_xlabel("questions answered from text, in percent")
    axes.set_ylabel("quality in percent")
    axes.legend(frameon=False)
    caption = "Fallback: quality against the share of text, on questions the router had not seen."
    return {"caption": caption, "png": _png(figure)}


def _figure() -> tuple[Any, Any]:
    # Without pyplot, which keeps figures and chooses a window system.
    library = load_extra("matplotlib.figure", extra="eval", purpose="The report")
    figure = library.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> str:  # noqa: ANN401 - matplotlib's
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
