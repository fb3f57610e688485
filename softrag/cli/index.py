"""`softrag index`: files and folders into the store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from softrag.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_STORE,
    Device,
    Json,
    Model,
    Store,
    load_engine,
)

if TYPE_CHECKING:
    from softrag.answer import AddReport
    from softrag.documents import Document
    from softrag.engine import SoftRAG


def index(
    paths: Annotated[
        list[Path],
        typer.Argument(exists=True, help="Files and folders: .txt, .md, .html, .pdf, .jsonl."),
    ],
    store: Store = DEFAULT_STORE,
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    codec: Annotated[
        Literal["bf16", "fp16", "int8", "fp8", "int4"] | None,
        typer.Option(help="How a new store keeps memories; bf16 unless given."),
    ] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest chunk in tokens; 128 unless given.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Chunks stored at a time.")] = 64,
    json: Json = False,
) -> None:
    """Compress documents into the store.

    Run it again after changes: what is stored already is not compressed again, and chunks that are
    no longer in a file are deleted. Stopped at any point, it continues where it was.
    """
    from softrag.cli.show import print_json, report_values

    with load_engine(
        model,
        store,
        device=device,
        codec=codec,
        load_decoder=False,
        chunk_tokens=chunk_tokens,
        create=True,
    ) as engine:
        report = add_files(engine, paths, batch_size=batch_size, quiet=json)
    if json:
        print_json(report_values(report))
    else:
        print_report(report, store)
    if not report.documents:
        raise typer.Exit(1)


def add_files(
    engine: SoftRAG, paths: list[Path], *, batch_size: int = 64, quiet: bool = False
) -> AddReport:
    """Add files and folders, with a progress bar on a terminal; unreadable files go to `errors`."""
    from softrag.answer import AddError
    from softrag.files import read_files

    unreadable: list[AddError] = []
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.completed:.0f} documents"),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.description}"),
    )
    with Progress(
        *columns, console=console, disable=quiet or not console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task("", total=None, speed="")

        def documents() -> Iterator[Document]:
            for result in read_files(paths):
                if result.error is not None:
                    unreadable.append(AddError(source=str(result.path), message=str(result.error)))
                progress.update(task, description=result.path.name)
                for document in result.documents:
                    yield document
                    # Back here, the document before is split, and full batches are stored.
                    done = progress.tasks[0]
                    speed = (done.completed + 1) / max(done.elapsed or 0.0, 1e-3)
                    progress.update(task, advance=1, speed=f"{speed:.1f} documents/s")

        report = engine.add(documents(), batch_size=batch_size)
    return replace(report, errors=[*unreadable, *report.errors])


def print_report(report: AddReport, store: str) -> None:
    """Print what was done, and what was left out."""
    errors = Console(stderr=True)
    for error in report.errors:
        errors.print(f"Left out: {error.message}", style="yellow", markup=False, soft_wrap=True)
    chunks = report.chunks_added + report.chunks_unchanged
    Console().print(
        f"{report.documents} documents in {store}: {report.chunks_added} chunks added, "
        f"{report.chunks_unchanged} unchanged, {report.chunks_deleted} deleted "
        f"({report.seconds:.1f} s, {chunks / max(report.seconds, 1e-3):.0f} chunks/s)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
