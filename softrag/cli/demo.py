"""`softrag demo`: ten questions about the shipped documents, from memories and from text."""

from __future__ import annotations

import json as json_module
import shutil
import sys
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from softrag.cli.index import add_files, print_report
from softrag.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_STORE,
    DEMO,
    Device,
    EngineOptions,
    Json,
    Model,
    Store,
)

if TYPE_CHECKING:
    from softrag.answer import Answer
    from softrag.engine import SoftRAG

MAX_NEW_TOKENS = 48


def demo(
    store: Store = DEFAULT_STORE,
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    json: Json = False,
) -> None:
    """Index the shipped documents and answer ten questions from memories and from text."""
    from softrag.cli.show import answer_values, print_json, report_values

    console = Console(quiet=json)
    questions, gold = read_questions()
    options = EngineOptions(store=store, model=model, device=device)
    with options.open(create=True) as engine:
        console.print("Compressing the documents into memories …", style="dim")
        report = add_files(engine, [DEMO / "corpus"], quiet=json)
        if not json:
            print_report(report, store)
        # The first answer would otherwise pay for starting the libraries' threads.
        engine.ask(questions[0], mode="closed", max_new_tokens=1)
        pairs = [
            (question, *_ask_both(console, engine, number, question))
            for number, question in enumerate(questions, 1)
        ]
    if json:
        print_json(
            {
                "index": report_values(report),
                "questions": [
                    {
                        "question": question,
                        "answers": answers,
                        "memory": answer_values(question, memory),
                        "text": answer_values(question, text),
                    }
                    for (question, memory, text), answers in zip(pairs, gold, strict=True)
                ],
            }
        )
        return
    _print_summary(console, [(memory, text) for _, memory, text in pairs], gold)
    _print_next(console, store)


def read_questions() -> tuple[list[str], list[list[str]]]:
    """Return the demo's questions, and the accepted answers of each."""
    records = json_module.loads((DEMO / "questions.json").read_text(encoding="utf-8"))
    return [record["question"] for record in records], [record["answers"] for record in records]


def _ask_both(
    console: Console, engine: SoftRAG, number: int, question: str
) -> tuple[Answer, Answer]:
    """Answer a question from memories, streaming, and from the same chunks as text."""
    from softrag.cli.show import costs, print_sources, print_stream

    console.print()
    console.rule(Text(f"{number}. {question}", style="bold"), align="left")
    console.print("from memories: ", style="green", end="")
    stream = engine.stream(question, max_new_tokens=MAX_NEW_TOKENS)
    print_stream(console, stream)
    memory = stream.answer
    text = engine.answer_from(question, memory.sources, mode="text", max_new_tokens=MAX_NEW_TOKENS)
    console.print(Text.assemble(("from text:     ", "blue"), text.text.strip()))
    console.print(costs(memory), style="dim", highlight=False)
    print_sources(console, memory.sources[:3])
    return memory, text


def _print_summary(
    console: Console, pairs: list[tuple[Answer, Answer]], gold: list[list[str]]
) -> None:
    from softrag.evaluation import match

    memories, texts = zip(*pairs, strict=True)
    table = Table(title=f"{len(pairs)} questions, means", box=None, padding=(0, 2), pad_edge=False)
    for name in ("", "right", "prompt tokens", "to first word", "in all"):
        table.add_column(name, justify="right" if name else "left")
    for name, answers in (("memories", memories), ("text", texts)):
        right = sum(match(a.text, wanted) > 0 for a, wanted in zip(answers, gold, strict=True))
        table.add_row(
            name,
            str(right),
            f"{mean(answer.usage.prompt_tokens for answer in answers):.0f}",
            f"{mean(answer.timings.first_token_s for answer in answers):.2f} s",
            f"{mean(answer.timings.total_s for answer in answers):.2f} s",
        )
    console.print()
    console.print(table)
    console.print(
        "The demo model is small and briefly trained: its memories save tokens and time, but it "
        "often misreads them.",
        style="dim",
    )


def _print_next(console: Console, store: str) -> None:
    option = "" if store == DEFAULT_STORE else f" --store {store}"
    # In an environment that is not activated, the command has a path.
    called = Path(sys.argv[0])
    command = str(called) if called.name == "softrag" and not shutil.which("softrag") else "softrag"
    console.print()
    console.print(
        Panel.fit(
            Text(
                f'{command} ask "Who was Charles Darwin?"{option}\n'
                f'{command} ask "…" --mode text{option}\n'
                f"{command} chat{option}\n"
                f"{command} index YOUR_FOLDER --store my_store"
            ),
            title="Now ask your own",
        )
    )
