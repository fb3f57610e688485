"""`softrag chat`: question after question, with the model loaded once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from io import TextIOWrapper
from typing import TYPE_CHECKING

from rich.console import Console

from softrag.cli.options import (
    EngineOptions,
    Json,
    MaxNewTokens,
    ModeName,
    TopK,
    with_engine_options,
)

if TYPE_CHECKING:
    from softrag.documents import Hit

HELP = (
    "/mode memory|mixed|text|closed changes what is read, /sources shows the last answer's "
    "sources, /quit ends"
)


@with_engine_options
def chat(
    engine_options: EngineOptions,
    top_k: TopK = 5,
    mode: ModeName = "memory",
    max_new_tokens: MaxNewTokens = 128,
    json: Json = False,
) -> None:
    """Answer questions one after another; each is answered by itself.

    Questions come from the terminal, or one per line from a pipe.
    """
    from softrag.cli.show import answer_values, costs, print_json, print_sources, print_stream
    from softrag.errors import SoftRAGError

    console = Console()
    sources: list[Hit] = []
    with engine_options.open() as engine:
        if not json and sys.stdin.isatty():
            console.print(HELP, style="dim", markup=False, highlight=False)
        for line in _lines(console):
            if line in ("/quit", "/exit", "quit", "exit"):
                return
            if line == "/sources":
                print_sources(console, sources)
                continue
            if line in ("/mode memory", "/mode mixed", "/mode text", "/mode closed"):
                mode = line.removeprefix("/mode ")  # type: ignore[assignment]
                continue
            if line.startswith("/"):
                console.print(HELP, style="dim", markup=False, highlight=False)
                continue
            try:
                stream = engine.stream(line, k=top_k, mode=mode, max_new_tokens=max_new_tokens)
                if json:
                    for _ in stream:
                        pass
                    print_json(answer_values(line, stream.answer))
                    continue
                print_stream(console, stream)
            except (SoftRAGError, ValueError) as error:
                if json or not sys.stdin.isatty():
                    raise
                # At a terminal, a question that fails is no reason to lose the loaded model.
                console.print(f"Error: {error}", style="red", markup=False)
                continue
            sources = stream.sources
            console.print(costs(stream.answer), style="dim", highlight=False)


def _lines(console: Console) -> Iterator[str]:
    if isinstance(sys.stdin, TextIOWrapper):
        # A byte that is no UTF-8 is no reason to leave the lines behind it unanswered.
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = console.input("[bold cyan]> ") if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            return
        if not line and not sys.stdin.isatty():
            return
        if line.strip():
            yield line.strip()
