"""How results look: JSON for machines, rich for people."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from softrag.answer import AddReport, Answer, reads_memories
from softrag.documents import Hit


def print_json(value: Any) -> None:  # noqa: ANN401 - whatever json takes
    """Print one line of JSON on stdout."""
    file = Console().file  # not through rich, which would wrap and colour it
    try:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")
    except UnicodeEncodeError:  # the name of a file may be no valid Unicode
        file.write(json.dumps(value) + "\n")


def answer_values(question: str, answer: Answer) -> dict[str, Any]:
    """Return an answer as plain values, without memories."""
    return {
        "question": question,
        "answer": answer.text,
        "mode": answer.mode,
        "finish_reason": answer.finish_reason,
        "fallback_score": answer.fallback_score,
        "sources": [hit_values(hit) for hit in answer.sources],
        "usage": asdict(answer.usage),
        "timings": asdict(answer.timings),
    }


def hit_values(hit: Hit) -> dict[str, Any]:
    """Return a hit as plain values, without its memory."""
    return {
        "id": hit.id,
        "score": hit.score,
        "relevance": hit.relevance,
        "source": hit.source,
        "title": hit.title,
        "text": hit.text,
        "metadata": dict(hit.metadata),
    }


def report_values(report: AddReport) -> dict[str, Any]:
    """Return a report as plain values."""
    return asdict(report)


def print_stream(console: Console, pieces: Iterable[str]) -> None:
    """Print an answer as it is written."""
    for piece in pieces:
        # markup off: an answer may hold [brackets].
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()


def print_sources(console: Console, hits: list[Hit]) -> None:
    """Print where an answer comes from."""
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    for number, hit in enumerate(hits, 1):
        start = " ".join(hit.text.split())[:70]
        table.add_row(
            Text(f"[{number}]", style="cyan"),
            Text(f"{hit.score:.2f}", style="dim"),
            Text(hit.title or hit.source or hit.id[:8], style="bold", overflow="ellipsis"),
            Text(f"{start}…", style="dim", no_wrap=True, overflow="ellipsis"),
        )
    console.print(table)


def costs(answer: Answer) -> str:
    """Say what an answer cost, and what text would have."""
    usage, timings = answer.usage, answer.timings
    prompt = f"{usage.prompt_tokens} prompt tokens"
    if reads_memories(answer.mode) and usage.text_prompt_tokens:
        prompt += f" instead of {usage.text_prompt_tokens} as text ({saved(answer):.0%} saved)"
    # Memories that the store has take no time.
    made = f"memories {timings.compress_s:.2f} s, " if timings.compress_s >= 0.005 else ""
    return (
        f"{prompt} · {usage.completion_tokens} written\n"
        f"search {timings.retrieve_s:.2f} s, {made}first word {timings.first_token_s:.2f} s, "
        f"in all {timings.total_s:.2f} s"
    )


def saved(answer: Answer) -> float:
    """Return the part of the text prompt's tokens that were not needed, 0 to 1."""
    text = answer.usage.text_prompt_tokens
    return 1 - answer.usage.prompt_tokens / text if text else 0.0
