"""`softrag store`: what is done to a store as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from softrag.cli.options import (
    DEFAULT_MODEL,
    Codec,
    Collection,
    Grpc,
    Json,
    Model,
    check_store,
)

if TYPE_CHECKING:
    from softrag.store import MemoryStore
    from softrag.store.record import StoreRecord

Place = Annotated[str, typer.Argument(help="Folder of a store, or the URL of a Qdrant server.")]

store = typer.Typer(
    no_args_is_help=True,
    help="Create, describe, move, save and restore stores. A server's API key is read from "
    "QDRANT_API_KEY.",
)


@store.command("create")
def create(
    place: Place,
    model: Model = DEFAULT_MODEL,
    collection: Collection = "softrag",
    codec: Codec = None,
    shards: Annotated[
        int | None, typer.Option(min=1, help="Parts, spread over the nodes; the server's choice.")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Copies of every part.")] = 1,
    write_consistency: Annotated[
        int, typer.Option(min=1, help="Copies that must have a write before it counts.")
    ] = 1,
    quantization: Annotated[
        Literal["int8", "binary"] | None, typer.Option(help="Search vectors in fewer bits in RAM.")
    ] = None,
    vectors_on_disk: Annotated[
        bool, typer.Option("--vectors-on-disk", help="Full search vectors on disk, not in RAM.")
    ] = False,
    grpc: Grpc = False,
    json: Json = False,
) -> None:
    """Create an empty store for a model; the layout is for servers.

    `softrag index` creates what it needs by itself, with the server's own layout.
    """
    from softrag.checkpoint import locate, read_config
    from softrag.embedder import default_embedder
    from softrag.store import CollectionLayout, MemoryStore

    embedder = default_embedder()
    with MemoryStore.open(
        place,
        collection=collection,
        fingerprint=read_config(locate(model)).fingerprint,
        embedder=embedder.name,
        dimension=embedder.dimension,
        codec=codec,
        prefer_grpc=grpc,
        layout=CollectionLayout(
            shards=shards,
            replicas=replicas,
            write_consistency=write_consistency,
            quantization=quantization,
            vectors_on_disk=vectors_on_disk,
        ),
    ) as opened:
        _show(opened, json=json)


@store.command("info")
def info(
    place: Place, collection: Collection = "softrag", grpc: Grpc = False, json: Json = False
) -> None:
    """Show what a store holds and how large it is."""
    with _open(place, collection, grpc) as opened:
        _show(opened, json=json)


@store.command("migrate")
def migrate(
    source: Place,
    target: Place,
    collection: Collection = "softrag",
    to_collection: Annotated[
        str | None, typer.Option(help="The target's collection, if named otherwise.")
    ] = None,
    codec: Codec = None,
    grpc: Grpc = False,
    json: Json = False,
) -> None:
    """Copy a store into another, with another codec if wanted; nothing is compressed again.

    Run it again after an interruption, or for what was added since: only that is sent.
    """
    from softrag.cli.show import print_json
    from softrag.store import migrate as migrate_store

    console = Console(stderr=True)
    with _open(source, collection, grpc) as old:
        with _open_target(old.record, target, to_collection or collection, codec, grpc) as new:
            with Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console,
                disable=json or not console.is_terminal,
                transient=True,
            ) as progress:
                task = progress.add_task("", total=old.count())
                report = migrate_store(
                    old, new, on_progress=lambda done: progress.update(task, completed=done)
                )
    if json:
        print_json(asdict(report))
    else:
        _say(f"{report.chunks_copied} chunks copied, {report.chunks_unchanged} there already")


@store.command("snapshot")
def snapshot(
    place: Place,
    file: Annotated[Path, typer.Argument(help="Where to; a file that exists is replaced.")],
    collection: Collection = "softrag",
    json: Json = False,
) -> None:
    """Save a store to a file. In a cluster, save every node by its own URL."""
    from softrag.cli.show import print_json
    from softrag.store import snapshot as take_snapshot

    with _open(place, collection, False) as opened:
        nbytes = take_snapshot(opened, file)
    if json:
        print_json({"file": str(file), "bytes": nbytes})
    else:
        _say(f"{place} saved to {file}, {nbytes:,} bytes")


@store.command("restore")
def restore(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A snapshot.")],
    place: Place,
    collection: Collection = "softrag",
    json: Json = False,
) -> None:
    """Make a store of a snapshot: in a new folder, or in place of a server's collection."""
    from softrag.store import restore as restore_store

    restore_store(file, place, collection=collection)
    with _open(place, collection, False) as opened:
        _show(opened, json=json)


@contextmanager
def _open(place: str, collection: str, grpc: bool) -> Iterator[MemoryStore]:
    check_store(place)
    from softrag.store import MemoryStore

    with MemoryStore.open(place, collection=collection, prefer_grpc=grpc) as opened:
        yield opened


def _open_target(
    record: StoreRecord, place: str, collection: str, codec: str | None, grpc: bool
) -> MemoryStore:
    """Open the store that a migration fills; a new one has the source's codec unless told."""
    from softrag.errors import StoreError
    from softrag.store import MemoryStore

    try:
        return MemoryStore.open(place, collection=collection, codec=codec, prefer_grpc=grpc)
    except StoreError:  # not there yet; any other reason comes up again
        return MemoryStore.open(
            place,
            collection=collection,
            fingerprint=record.fingerprint,
            embedder=record.embedder,
            dimension=record.dimension,
            codec=codec or record.codec,
            prefer_grpc=grpc,
        )


def _show(opened: MemoryStore, *, json: bool) -> None:
    from softrag.cli.show import print_json

    values = asdict(opened.info())
    if json:
        print_json(values)
        return
    for name, value in values.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        _say(f"{name.replace('_', ' '):14} {shown}")


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
