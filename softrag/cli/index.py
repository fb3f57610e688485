"""`softrag index`: files and folders into the store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from softrag.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_STORE,
    Codec,
    Collection,
    Device,
    Grpc,
    Json,
    Model,
    Rate,
    Store,
    hush_transformers,
)

if TYPE_CHECKING:
    from softrag.answer import AddReport
    from softrag.bulk import BulkReport, WorkerSetup
    from softrag.bulk import Progress as BulkProgress
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
    collection: Collection = "softrag",
    codec: Codec = None,
    rate: Rate = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest chunk in tokens; 128 unless given.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Chunks stored at a time; 64 unless given (512 on several GPUs)."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that compress: one for each GPU unless given. On a CPU each has one "
            "thread. Under torchrun or accelerate launch, their processes are the workers.",
        ),
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete from the store files that no longer exist.")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0.0, help="Of the machine: shows what chunks cost.")
    ] = None,
    grpc: Grpc = False,
    json: Json = False,
) -> None:
    """Compress documents into the store.

    Run it again after changes: what is stored already is not compressed again, and chunks that are
    no longer in a file are deleted. Stopped at any point, it continues where it was.
    """
    from softrag.bulk import BulkReport, StoreAddress, WorkerSetup, prune_vanished
    from softrag.cli.show import print_json, report_values
    from softrag.errors import UnreadableFileError
    from softrag.files import SUFFIXES, find_files

    if not prune and next(find_files(paths), None) is None:
        raise UnreadableFileError(
            f"{', '.join(map(str, paths))} holds nothing that softrag reads, which is files of "
            f"{', '.join(SUFFIXES)}."
        )
    report: BulkReport | None
    address = StoreAddress(location=store, collection=collection, codec=codec, prefer_grpc=grpc)
    workers = workers or _default_workers(device)
    if workers > 1 or "WORLD_SIZE" in os.environ:
        setup = WorkerSetup(
            checkpoint=model,
            store=address,
            device=device,
            chunk_tokens=chunk_tokens,
            batch_size=batch_size,
            rate=rate,
        )
        report = index_with_workers(paths, setup=setup, workers=workers, prune=prune, quiet=json)
        if report is None:
            return  # the first process of the launcher reports for all
    else:
        from softrag.engine import SoftRAG

        hush_transformers()
        with SoftRAG.from_pretrained(
            model,
            store=store,
            device=device,
            collection=collection,
            codec=codec,
            prefer_grpc=grpc,
            load_decoder=False,
            chunk_tokens=chunk_tokens,
            rate=rate,
        ) as engine:
            sources: set[str] = set()
            added = add_files(
                engine, paths, batch_size=batch_size or 64, quiet=json, sources=sources
            )
            pruned = []
            if prune:
                pruned = prune_vanished(
                    engine.store, paths, read=sources, documents=added.documents
                )
        report = BulkReport(**vars(added), workers=1, restarts=0, sources_pruned=len(pruned))
    values = report_values(report)
    if report.chunks_added:
        values["chunks_per_second"] = report.chunks_per_second
        if price_per_hour is not None:
            values["cost_per_million_chunks"] = report.cost_per_million(price_per_hour)
    if json:
        print_json(values)
    else:
        print_report(report, store)
        print_work(report, price_per_hour)
    if not report.documents:
        raise typer.Exit(1)


def add_files(
    engine: SoftRAG,
    paths: list[Path],
    *,
    batch_size: int = 64,
    quiet: bool = False,
    sources: set[str] | None = None,
) -> AddReport:
    """Add files and folders, with a progress bar on a terminal.

    Args:
        engine: Where to.
        paths: Files and folders; what cannot be read goes to the report's `errors`.
        batch_size: Chunks stored at a time.
        quiet: Show no bar.
        sources: Gets the sources that were read.
    """
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
    with Bar(
        *columns, console=console, disable=quiet or not console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task("", total=None, speed="")

        def documents() -> Iterator[Document]:
            for result in read_files(paths):
                if result.error is not None:
                    unreadable.append(AddError(source=str(result.path), message=str(result.error)))
                progress.update(task, description=result.path.name)
                for document in result.documents:
                    if sources is not None and document.source is not None:
                        sources.add(document.source)
                    yield document
                    # Back here, the document before is split, and full batches are stored.
                    done = progress.tasks[0]
                    speed = (done.completed + 1) / max(done.elapsed or 0.0, 1e-3)
                    progress.update(task, advance=1, speed=f"{speed:.1f} documents/s")

        report = engine.add(documents(), batch_size=batch_size)
    return replace(report, errors=[*unreadable, *report.errors])


def index_with_workers(
    paths: list[Path], *, setup: WorkerSetup, workers: int, prune: bool, quiet: bool
) -> BulkReport | None:
    """Index with several processes, with one progress bar for all of them on a terminal."""
    from softrag.bulk import index_files

    console = Console(stderr=True)
    columns = (
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Bar(
        *columns, console=console, disable=quiet or not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task("", total=None, speed="loading the model")

        def show(now: BulkProgress, total: int) -> None:
            speed = (
                f"{now.documents} documents, {now.chunks / max(now.seconds, 1e-3):.0f} chunks/s, "
                f"{now.workers} workers"
            )
            bar.update(task, total=total, completed=now.nbytes, speed=speed)

        return index_files(paths, setup=setup, workers=workers, prune=prune, on_progress=show)


def print_work(report: BulkReport, price_per_hour: float | None) -> None:
    """Print who worked, and what a million chunks take and cost."""
    parts = []
    if report.workers > 1:
        parts.append(f"{report.workers} workers")
    if report.restarts:
        parts.append(f"{report.restarts} died and were replaced")
    if report.sources_pruned:
        parts.append(f"{report.sources_pruned} files that no longer exist deleted")
    if report.chunks_added:
        hours = 1_000_000 / report.chunks_per_second / 3600
        million = f"a million chunks take {hours:.2f} hours"
        if price_per_hour is not None:
            cost = report.cost_per_million(price_per_hour)
            million += f" and cost {cost:.2f} at {price_per_hour:g} an hour"
        if report.workers > 1 or price_per_hour is not None:
            parts.append(million)
    if parts:
        Console().print("; ".join(parts), markup=False, highlight=False, soft_wrap=True)


def _default_workers(device: str | None) -> int:
    import torch

    return max(1, torch.cuda.device_count()) if device is None else 1


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
