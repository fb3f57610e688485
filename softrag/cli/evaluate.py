"""`softrag eval`: a question file answered closed book, from text and from memories."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from softrag.cli.options import DEFAULT_MODEL, Device, Json, MaxNewTokens, Model, hush_transformers

if TYPE_CHECKING:
    from softrag.answer import Mode
    from softrag.evaluation import Question
    from softrag.question_set import AnsweredSet


def evaluate(
    file: Annotated[
        Path,
        typer.Argument(
            exists=True, dir_okay=False, help="Questions with documents: .jsonl or .jsonl.zst."
        ),
    ],
    modes: Annotated[
        str, typer.Option(help="What to compare, with commas between.")
    ] = "closed,text,memory",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many.")] = None,
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 16,
    max_new_tokens: MaxNewTokens = 64,
    json: Json = False,
) -> None:
    """Measure what memories cost and save on your own questions."""
    from softrag.cli.show import print_json

    wanted = _parse_modes(modes)
    scores, predictions, questions = _run(
        file,
        wanted,
        limit,
        model,
        device,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        quiet=json,
    )
    if json:
        print_json(
            {
                "file": str(file),
                "model": model,
                "questions": len(questions),
                "modes": scores,
                "answers": [
                    {
                        "id": each.id,
                        "question": each.question,
                        "answers": list(each.answers),
                        **{mode: predictions[mode][place] for mode in wanted},
                    }
                    for place, each in enumerate(questions)
                ],
            }
        )
        return
    _print_table(scores, len(questions))


def _parse_modes(modes: str) -> list[Mode]:
    from softrag.answer import Mode

    wanted = [mode.strip() for mode in modes.split(",") if mode.strip()]
    for mode in wanted:
        if mode not in get_args(Mode):
            raise typer.BadParameter(
                f"{mode!r} is no mode; choose from {', '.join(get_args(Mode))}.",
                param_hint="--modes",
            )
    if not wanted:
        raise typer.BadParameter("name at least one mode.", param_hint="--modes")
    return cast("list[Mode]", list(dict.fromkeys(wanted)))


def _run(
    file: Path,
    modes: Sequence[Mode],
    limit: int | None,
    model: str,
    device: str | None,
    *,
    batch_size: int,
    max_new_tokens: int,
    quiet: bool,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]], list[Question]]:
    """Return scores by mode, answers by mode, and the questions."""
    import threading

    from softrag.compressor import Compressor
    from softrag.decoder import TorchDecoder
    from softrag.evaluation import read_questions
    from softrag.model import SoftRAGModel
    from softrag.question_set import answer_set

    hush_transformers()
    questions = read_questions(file, limit)
    needs_compressor = "memory" in modes
    loaded = SoftRAGModel.from_pretrained(model, device=device, load_compressor=needs_compressor)
    lock = threading.Lock()
    compressor = Compressor(loaded, lock=lock) if needs_compressor else None
    decoder = TorchDecoder(loaded, batch_size=batch_size, lock=lock)
    scores: dict[str, dict[str, Any]] = {}
    predictions: dict[str, list[str]] = {}
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, disable=quiet or not console.is_terminal, transient=True
    ) as progress:
        tasks = {mode: progress.add_task(mode, total=len(questions)) for mode in modes}
        for mode in modes:
            answered = answer_set(
                questions,
                mode=mode,
                decoder=decoder,
                compressor=compressor,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                on_answers=partial(progress.advance, tasks[mode]),
            )
            predictions[mode] = [result.text for result in answered.results]
            scores[mode] = _score(questions, answered)
    return scores, predictions, questions


def _score(questions: Sequence[Question], answered: AnsweredSet) -> dict[str, Any]:
    from softrag.evaluation import score_answers

    n = len(questions)
    texts = [result.text for result in answered.results]
    return {
        **score_answers(texts, [each.answers for each in questions]),
        "prompt_tokens": sum(result.prompt_tokens for result in answered.results) / n,
        "completion_tokens": sum(result.completion_tokens for result in answered.results) / n,
        "compress_s": answered.compress_s,
        "decode_s": answered.decode_s,
    }


def _print_table(scores: dict[str, dict[str, Any]], questions: int) -> None:
    table = Table(title=f"{questions} questions", box=None, padding=(0, 2), pad_edge=False)
    table.add_column("mode", style="bold")
    names = next(iter(scores.values()))
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for mode, values in scores.items():
        table.add_row(mode, *(f"{values[name]:.3g}" for name in names))
    Console().print(table)
