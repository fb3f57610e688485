"""`softrag demo`: ten questions about the shipped documents, from memories, mixed and from text."""

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
    CopyBias,
    Device,
    EngineOptions,
    Json,
    Model,
    Store,
)

if TYPE_CHECKING:
    from softrag.answer import Answer, Mode
    from softrag.engine import SoftRAG

MAX_NEW_TOKENS = 48
# What the modes are called, in the order they are shown.
NAMES: dict[Mode, str] = {
    "memory": "memories",
    "mixed": "mixed",
    "text": "text",
}

MADE_ONCE = (
    "The demo model is small and briefly trained: its memories save tokens and time, but it often "
    "misreads them. Mixed reads the best chunk as text and the others from memories."
)
MADE_FOR_QUESTIONS = (
    "These memories are made for each question, by a compressor as large as the decoder: they save "
    "the decoder's tokens, and no time beside so small a decoder."
)


def demo(
    store: Store = DEFAULT_STORE,
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    copy_bias: CopyBias = None,
    json: Json = False,
) -> None:
    """Index the shipped documents and answer ten questions from memories, mixed and from text."""
    from softrag.cli.show import answer_values, print_json, report_values

    console = Console(quiet=json)
    questions, gold = read_questions()
    options = EngineOptions(store=store, model=model, device=device, copy_bias=copy_bias)
    with options.open(create=True) as engine:
        console.print("Compressing the documents into memories …", style="dim")
        report = add_files(engine, [DEMO / "corpus"], quiet=json)
        if not json:
            print_report(report, store)
        compressor = engine.compressor
        made_for_questions = compressor is not None and compressor.query_dependent
        # The first answer would otherwise pay for starting the libraries' threads.
        engine.ask(questions[0], mode="closed", max_new_tokens=1)
        answers = [
            _ask_each_way(console, engine, number, question)
            for number, question in enumerate(questions, 1)
        ]
    if json:
        print_json(
            {
                "index": report_values(report),
                "questions": [
                    {
                        "question": question,
                        "answers": wanted,
                        **{mode: answer_values(question, by_mode[mode]) for mode in NAMES},
                    }
                    for question, by_mode, wanted in zip(questions, answers, gold, strict=True)
                ],
            }
        )
        return
    _print_summary(console, answers, gold, MADE_FOR_QUESTIONS if made_for_questions else MADE_ONCE)
    _print_next(console, store)


def read_questions() -> tuple[list[str], list[list[str]]]:
    """Return the demo's questions, and the accepted answers of each."""
    records = json_module.loads((DEMO / "questions.json").read_text(encoding="utf-8"))
    return [record["question"] for record in records], [record["answers"] for record in records]


def _ask_each_way(
    console: Console, engine: SoftRAG, number: int, question: str
) -> dict[Mode, Answer]:
    """Answer a question from memories, streaming, and from the same chunks in the other modes."""
    from softrag.cli.show import costs, print_sources, print_stream

    console.print()
    console.rule(Text(f"{number}. {question}", style="bold"), align="left")
    console.print("from memories: ", style="green", end="")
    stream = engine.stream(question, max_new_tokens=MAX_NEW_TOKENS)
    print_stream(console, stream)
    memory = stream.answer
    mixed, text = (
        engine.answer_from(question, memory.sources, mode=mode, max_new_tokens=MAX_NEW_TOKENS)
        for mode in ("mixed", "text")
    )
    console.print(Text.assemble(("mixed:         ", "cyan"), mixed.text.strip()))
    console.print(Text.assemble(("from text:     ", "blue"), text.text.strip()))
    console.print(costs(memory), style="dim", highlight=False)
    print_sources(console, memory.sources[:3])
    return {"memory": memory, "mixed": mixed, "text": text}


def _print_summary(
    console: Console, answers: list[dict[Mode, Answer]], gold: list[list[str]], note: str
) -> None:
    from softrag.evaluation import match

    title = f"{len(answers)} questions, means"
    table = Table(title=title, box=None, padding=(0, 2), pad_edge=False)
    for name in ("", "right", "prompt tokens", "to first word", "in all"):
        table.add_column(name, justify="right" if name else "left")
    for mode, name in NAMES.items():
        read = [by_mode[mode] for by_mode in answers]
        right = sum(match(a.text, wanted) > 0 for a, wanted in zip(read, gold, strict=True))
        table.add_row(
            name,
            str(right),
            f"{mean(answer.usage.prompt_tokens for answer in read):.0f}",
            f"{mean(a.timings.compress_s + a.timings.first_token_s for a in read):.2f} s",
            f"{mean(answer.timings.total_s for answer in read):.2f} s",
        )
    console.print()
    console.print(table)
    console.print(note, style="dim")


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
                f'{command} ask "…" --mode mixed{option}\n'
                f"{command} chat{option}\n"
                f"{command} index YOUR_FOLDER --store my_store"
            ),
            title="Now ask your own",
        )
    )
