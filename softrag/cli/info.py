"""`softrag info`: what the model and the store are."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from softrag.cli.options import (
    DEFAULT_MODEL,
    DEFAULT_STORE,
    Json,
    Model,
    Store,
    has_store,
    hush_transformers,
)


def info(
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="Checkpoint of any layout: a folder or a hub name.", metavar="MODEL"),
    ] = None,
    store: Store = DEFAULT_STORE,
    model: Model = DEFAULT_MODEL,
    load: Annotated[
        bool,
        typer.Option(
            "--load", help="Load the model for its fingerprint, where its files don't hold it."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Show the model and the store: sizes, licence, fingerprints, and whether they fit."""
    from softrag.cli.show import print_json

    hush_transformers()
    values: dict[str, Any] = {
        "model": _model(checkpoint or model, load=load),
        "store": _store(store),
    }
    if values["store"] is not None and values["model"]["fingerprint"] is not None:
        values["fit"] = values["model"]["fingerprint"] == values["store"]["fingerprint"]
    if json:
        print_json(values)
        return
    table = Table(box=None, show_header=False, padding=(0, 2), pad_edge=False)
    for part in ("model", "store"):
        table.add_row(f"[bold]{part}", "")
        if values[part] is None:
            table.add_row(f"  no store at {store}", "")
        for name, value in (values[part] or {}).items():
            if value is not None or name == "fingerprint":
                table.add_row(f"  {name.replace('_', ' ')}", _readable(value))
    if "fit" in values:
        table.add_row("[bold]fit", "yes" if values["fit"] else "[red]no: another model's memories")
    Console().print(table)


def _model(model: str, *, load: bool) -> dict[str, Any]:
    from softrag.card import read_licence
    from softrag.checkpoint import locate
    from softrag.layouts import summarize

    # The config alone: no weights are needed to say what they are.
    folder = locate(model)
    summary = summarize(folder)
    fingerprint = summary.fingerprint
    if fingerprint is None and load:
        from softrag.model import SoftRAGModel

        fingerprint = SoftRAGModel.from_pretrained(folder, load_decoder=False).fingerprint
    licence = read_licence(folder)
    return {
        "checkpoint": str(folder),
        "family": summary.layout,
        "fingerprint": fingerprint,
        "decoder": summary.decoder,
        "compressor": summary.compressor,
        "rate": summary.rate,
        "soft_tokens_per_document": summary.memory_tokens or f"1 for {summary.rate} tokens",
        "max_document_tokens": summary.max_document_tokens,
        "query_dependent": summary.query_dependent,
        "licence": licence.name or "unknown",
        "licence_note": licence.note,
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def _store(location: str) -> dict[str, Any] | None:
    from softrag.store import MemoryStore

    if not has_store(location):
        return None
    with MemoryStore.open(location) as store:
        return {**asdict(store.info()), "sources": len(store.sources())}


def _readable(value: object) -> str:
    if value is None:
        return "made when it is loaded (--load)"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
