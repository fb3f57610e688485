"""`softrag eval`: the same questions answered closed book, from text and from memories."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from softrag.cli.options import (
    DEFAULT_MODEL,
    CopyBias,
    Device,
    Dtype,
    Fallback,
    Json,
    MaxNewTokens,
    Rate,
    TopK,
    check_store,
    hush_transformers,
)

if TYPE_CHECKING:
    from softrag.comparison import (
        Calibration,
        ChatEndpoint,
        Comparison,
        FolderChunks,
        LoadedModel,
        Row,
        StoredChunks,
        Way,
    )
    from softrag.embedder import Embedder
    from softrag.evaluation import Question
    from softrag.router import Router

CHUNKS_PER_QUESTION = 4
"""Chunks shown to the writer for every question wanted; what it writes badly is left out."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What was asked for, checked."""

    models: Sequence[str]
    modes: Sequence[Way]
    codecs: Sequence[str]
    device: str | None
    dtype: str
    rate: int | None
    batch_size: int
    max_new_tokens: int
    with_compressor: bool
    with_state: bool
    lookahead: int
    copy_bias: float | None
    quiet: bool


def evaluate(
    file: Annotated[
        Path, typer.Argument(dir_okay=False, help="Questions and answers: .jsonl or .jsonl.zst.")
    ],
    store: Annotated[
        str | None, typer.Option(help="Ask over this store's chunks, not the file's documents.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(exists=True, help="Ask over the files in this folder instead.")
    ] = None,
    top_k: TopK = 5,
    as_given: Annotated[
        bool,
        typer.Option("--as-given", help="Read a file's documents in its order, not nearest first."),
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option(help="Checkpoint; repeat to compare several. $SOFTRAG_MODEL unless given."),
    ] = None,
    codecs: Annotated[
        str | None,
        typer.Option(help="How memories are stored, with commas between; as the store, or bf16."),
    ] = None,
    modes: Annotated[
        str,
        typer.Option(
            help="What to compare, with commas between: closed, text, memory, mixed, excerpts."
        ),
    ] = "closed,text,memory",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    rate: Rate = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 16,
    max_new_tokens: MaxNewTokens = 64,
    copy_bias: CopyBias = None,
    seed: Annotated[int, typer.Option(help="Of intervals, halves and drawn chunks.")] = 0,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="A model that judges answers; key in $OPENAI_API_KEY, if any."
        ),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Its name; the first one listed.")] = None,
    fallback: Fallback = None,
    calibrate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Fit a fallback and write it here.")
    ] = None,
    budget: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of questions it may answer from text.")
    ] = 0.2,
    state: Annotated[bool, typer.Option(help="Whether it may look at the decoder's state.")] = True,
    make_questions: Annotated[
        int | None,
        typer.Option(min=1, help="First write so many questions about the chunks into FILE."),
    ] = None,
    writer: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A model that writes them; the loaded one unless given."),
    ] = None,
    writer_model: Annotated[str | None, typer.Option(help="Its name; the first listed.")] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with plots: .html.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure what memories cost and save on your own questions."""
    from softrag.cli.evaluation_table import print_calibration, print_comparison
    from softrag.cli.show import print_json
    from softrag.comparison import (
        Comparison,
        retrieve_for,
        summarize,
        summarize_calibration,
        write_report,
    )
    from softrag.embedder import default_embedder
    from softrag.errors import MissingExtraError
    from softrag.evaluation import read_questions
    from softrag.question_set import nearest_first
    from softrag.router import LOOKAHEAD, Router

    wanted = _parse_modes(modes)
    both = {"text", "memory"} <= set(wanted)
    _check_options(
        file,
        store,
        corpus,
        make_questions,
        as_given=as_given,
        models=model or [],
        report=report,
        calibrate=calibrate,
    )
    if (calibrate or fallback) and (not both or len(model or []) > 1):
        raise typer.BadParameter("a fallback needs one model, and the modes text and memory.")
    if calibrate and not 0 < budget < 1:
        raise typer.BadParameter("must be between 0 and 1.", param_hint="--budget")
    if report or calibrate:
        _check_extras(report=report is not None, calibrate=calibrate is not None)
    router = Router.load(fallback) if fallback else None
    plan = _Plan(
        # Not as the option's envvar: of several values, typer would split it at spaces.
        models=model or [os.environ.get("SOFTRAG_MODEL", DEFAULT_MODEL)],
        modes=wanted,
        codecs=_parse_codecs(codecs),
        device=device,
        dtype=dtype,
        rate=rate,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        # It tells how long memories are, and its tokenizer measures the chunks of files.
        with_compressor=not set(wanted) <= {"closed", "text"} or corpus is not None,
        with_state=bool(calibrate and state) or bool(router and router.with_state),
        lookahead=router.lookahead if router else LOOKAHEAD if calibrate else 0,
        copy_bias=copy_bias,
        quiet=json,
    )
    hush_transformers()
    questions = [] if make_questions else _questions(file, limit, wanted, bool(store or corpus))
    first = _load(plan, 0)
    embedder = default_embedder()  # It loads its model when it is first asked to embed.
    with ExitStack() as stack:
        chunks = _open_chunks(store, corpus, embedder, first, stack)
        if make_questions and chunks is not None:
            _write_questions(
                file,
                chunks,
                make_questions,
                seed,
                first,
                _endpoint(writer, writer_model) if writer else None,
            )
            questions = read_questions(file, limit)
        if chunks is not None:
            questions = retrieve_for(questions, chunks, top_k)
        elif not as_given and wanted != ["closed"]:
            # Documents of a file stand in any order; a store would return the best first.
            try:
                questions = nearest_first(questions, embedder)
            except MissingExtraError as error:
                raise MissingExtraError(f"{error} Or keep the file's order: --as-given") from error
        # As the store has them, so that what is measured is what is answered from.
        stored_as = chunks.codec if chunks else "bf16"
    plan = replace(plan, codecs=plan.codecs or [stored_as])
    rows = _rows(questions, first, plan, embedder)
    comparison = Comparison(questions=questions, rows=rows, seed=seed)
    if judge:
        comparison = _judged(comparison, _endpoint(judge, judge_model))
    if router is not None:
        comparison = _with_fallback(comparison, router, first)
    calibration = refusal = None
    if calibrate is not None:
        try:
            calibration = _calibrate(comparison, first, plan, budget=budget, with_state=state)
            calibration.router.save(calibrate)
        except ValueError as error:  # the answers took long: they are shown before it is raised
            refusal = error
    if report is not None:
        write_report(comparison, report, title=file.name, calibration=calibration)
    if json:
        values = {"file": str(file), "models": list(plan.models), **summarize(comparison)}
        if calibration is not None:
            values["calibration"] = summarize_calibration(calibration)
        print_json(values)
    else:
        print_comparison(comparison)
        if calibration is not None:
            print_calibration(calibration, calibrate)
    if refusal is not None:
        raise refusal


def _parse_modes(modes: str) -> list[Way]:
    from softrag.comparison import Way

    wanted = [mode.strip() for mode in modes.split(",") if mode.strip()]
    for mode in wanted:
        if mode not in get_args(Way):
            raise typer.BadParameter(
                f"{mode!r} is no mode; choose from {', '.join(get_args(Way))}.",
                param_hint="--modes",
            )
    if not wanted:
        raise typer.BadParameter("name at least one mode.", param_hint="--modes")
    return cast("list[Way]", list(dict.fromkeys(wanted)))


def _parse_codecs(codecs: str | None) -> list[str]:
    from softrag.codec import CODECS

    wanted = [codec.strip() for codec in (codecs or "").split(",") if codec.strip()]
    for codec in wanted:
        if codec not in CODECS:
            raise typer.BadParameter(
                f"{codec!r} is no codec; choose from {', '.join(CODECS)}.", param_hint="--codecs"
            )
    return list(dict.fromkeys(wanted))


def _check_options(
    file: Path,
    store: str | None,
    corpus: Path | None,
    make_questions: int | None,
    *,
    as_given: bool,
    models: Sequence[str],
    report: Path | None,
    calibrate: Path | None,
) -> None:
    if store and corpus:
        raise typer.BadParameter("give --store or --corpus, not both.")
    if as_given and (store or corpus):
        raise typer.BadParameter(
            "--as-given is about the file's own documents; those that --store or --corpus finds "
            "come best first."
        )
    if make_questions is None and not file.exists():
        raise typer.BadParameter(
            f"{file} does not exist. Write one, or let --make-questions write it.",
            param_hint="FILE",
        )
    if make_questions is not None and not (store or corpus):
        raise typer.BadParameter("--make-questions needs --store or --corpus to ask about.")
    if make_questions is not None and (file.exists() or not file.name.endswith(".jsonl")):
        raise typer.BadParameter(
            f"--make-questions writes a new .jsonl file, but {file} exists or is named otherwise.",
            param_hint="FILE",
        )
    for written in (report, calibrate):
        if written is not None and not written.parent.is_dir():
            raise typer.BadParameter(f"{written} cannot be written: {written.parent} is no folder.")
    if store:
        check_store(store)
    names = [Path(model).name for model in models]
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"the models' names must differ, found {', '.join(names)}.")


def _check_extras(*, report: bool, calibrate: bool) -> None:
    """Say what is missing before the work, not after it."""
    from softrag.extras import load_extra

    if report:
        load_extra("matplotlib", extra="eval", purpose="The report")
    if calibrate:
        load_extra("sklearn", extra="eval", purpose="Calibration")


def _load(plan: _Plan, number: int) -> LoadedModel:
    from softrag.comparison import LoadedModel

    return LoadedModel.from_pretrained(
        plan.models[number],
        name=Path(plan.models[number]).name if len(plan.models) > 1 else "",
        device=plan.device,
        dtype=plan.dtype,
        rate=plan.rate,
        load_compressor=plan.with_compressor,
        batch_size=plan.batch_size,
    )


def _open_chunks(
    store: str | None,
    corpus: Path | None,
    embedder: Embedder,
    model: LoadedModel,
    stack: ExitStack,
) -> StoredChunks | FolderChunks | None:
    if not (store or corpus):
        return None
    from softrag.comparison import FolderChunks, StoredChunks

    if store:
        return stack.enter_context(StoredChunks(store, embedder))
    assert corpus is not None
    assert model.compressor is not None
    return FolderChunks(corpus, embedder, model.compressor)


def _endpoint(url: str, model: str | None) -> ChatEndpoint:
    from softrag.comparison import ChatEndpoint

    return ChatEndpoint(url=url, model=model, api_key=os.environ.get("OPENAI_API_KEY"))


def _write_questions(
    file: Path,
    chunks: StoredChunks | FolderChunks,
    n: int,
    seed: int,
    model: LoadedModel,
    endpoint: ChatEndpoint | None,
) -> None:
    from softrag.comparison import decoder_writer, endpoint_writer, write_questions

    drawn = chunks.sample(CHUNKS_PER_QUESTION * n, seed=seed)
    writer = endpoint_writer(endpoint) if endpoint else decoder_writer(model.decoder)
    written = write_questions(drawn, n, writer, file)
    Console(stderr=True).print(
        f"Wrote {written} questions to {file}, from {len(drawn)} chunks. Read them before you "
        "trust what they measure.",
        markup=False,
        soft_wrap=True,
    )


def _questions(
    file: Path, limit: int | None, modes: Sequence[Way], has_chunks: bool
) -> list[Question]:
    from softrag.evaluation import read_questions

    questions = read_questions(file, limit)
    if modes != ["closed"] and not has_chunks and not any(each.documents for each in questions):
        raise typer.BadParameter(
            f'no question in {file} has "docs" to answer from. Give --store or --corpus, or ask '
            "with --modes closed."
        )
    return questions


def _rows(
    questions: Sequence[Question], first: LoadedModel, plan: _Plan, embedder: Embedder
) -> list[Row]:
    from softrag.comparison import answer_rows

    rows: list[Row] = []
    n_rows = len(plan.models) * len(plan.modes) + (len(plan.codecs) - 1) * len(plan.models) * (
        "memory" in plan.modes
    )
    with _progress(n_rows * len(questions), quiet=plan.quiet) as progress:
        task = progress.tasks[0].id
        for number in range(len(plan.models)):
            rows += answer_rows(
                questions,
                # One after another: not every machine holds several.
                _load(plan, number) if number else first,
                modes=plan.modes,
                codecs=plan.codecs,
                batch_size=plan.batch_size,
                max_new_tokens=plan.max_new_tokens,
                with_state=plan.with_state,
                lookahead=plan.lookahead,
                copy_bias=plan.copy_bias,
                embedder=embedder,
                on_answers=lambda name, n: progress.update(task, description=name, advance=n),
            )
    return rows


@contextmanager
def _progress(total: int, *, quiet: bool) -> Iterator[Progress]:
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
        progress.add_task("compressing", total=total)
        yield progress


def _judged(comparison: Comparison, endpoint: ChatEndpoint) -> Comparison:
    from softrag.comparison import judge_answers

    rows = []
    for row in comparison.rows:
        answers = [result.text for result in row.results]
        verdicts, unclear = judge_answers(endpoint, comparison.questions, answers)
        if unclear:
            Console(stderr=True).print(
                f"{row.name}: the judge said neither yes nor no to {unclear} of {len(answers)} "
                "answers; they count as wrong.",
                style="yellow",
                markup=False,
                soft_wrap=True,
            )
        rows.append(replace(row, scores={**row.scores, "judge": verdicts}))
    return replace(comparison, rows=rows)


def _with_fallback(comparison: Comparison, router: Router, model: LoadedModel) -> Comparison:
    from softrag.comparison import fall_back

    router.check(model.decoder.fingerprint)
    routed = [
        fall_back(row, text, router, comparison.questions)
        for row in comparison.rows
        if row.mode == "memory" and (text := comparison.text_of(row)) is not None
    ]
    return replace(comparison, rows=[*comparison.rows, *routed])


def _calibrate(
    comparison: Comparison, model: LoadedModel, plan: _Plan, *, budget: float, with_state: bool
) -> Calibration:
    from softrag.comparison import calibrate
    from softrag.question_set import texts_of

    memory = next(row for row in comparison.rows if row.mode == "memory")
    text = comparison.text_of(memory)
    assert text is not None
    metric = "judge" if "judge" in memory.scores else "f1"
    return calibrate(
        memory.results,
        questions=[question.question for question in comparison.questions],
        texts=[texts_of(question) for question in comparison.questions],
        memory=memory.scores[metric],
        text=text.scores[metric],
        fingerprint=model.decoder.fingerprint,
        budget=budget,
        lookahead=plan.lookahead,
        with_state=with_state,
        seed=comparison.seed,
    )
