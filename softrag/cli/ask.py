"""`softrag ask`: one question, one answer."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from softrag.cli.options import (
    EngineOptions,
    Json,
    MaxNewTokens,
    ModeName,
    Temperature,
    TopK,
    with_engine_options,
)


@with_engine_options
def ask(
    question: Annotated[str, typer.Argument(help="What you want to know.")],
    engine_options: EngineOptions,
    top_k: TopK = 5,
    mode: ModeName = "memory",
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Ends the answer; may be given several times.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Only chunks with this metadata; repeatable."),
    ] = None,
    json: Json = False,
) -> None:
    """Answer a question from the store, and show its sources and costs."""
    from softrag.cli.show import answer_values, costs, print_json, print_sources, print_stream

    wanted = parse_where(where or [])
    console = Console()
    with engine_options.open() as engine:
        stream = engine.stream(
            question,
            k=top_k,
            mode=mode,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop=stop,
            where=wanted,
        )
        if json:
            for _ in stream:
                pass
            print_json(answer_values(question, stream.answer))
            return
        print_stream(console, stream)
        console.print()
        if mode != "closed" and not stream.sources:
            console.print("No chunk matches --where: nothing was read.", style="yellow")
        print_sources(console, stream.sources)
        console.print(costs(stream.answer), style="dim", highlight=False)


def parse_where(conditions: list[str]) -> dict[str, list[str | int | float | bool]] | None:
    """Turn `KEY=VALUE` conditions into a filter; the same key twice allows either value."""
    import json

    wanted: dict[str, list[str | int | float | bool]] = {}
    for condition in conditions:
        key, equals, value = condition.partition("=")
        if not (key and equals):
            raise typer.BadParameter(f"Expected KEY=VALUE, found {condition!r}.")
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = value
        plain = isinstance(parsed, str | int | float | bool)
        wanted.setdefault(key, []).append(parsed if plain else value)
    return wanted or None
