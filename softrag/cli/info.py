"""`softrag info`: what the model and the store are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from softrag.cli.options import DEFAULT_MODEL, DEFAULT_STORE, Json, Model, Store, hush_transformers


def info(store: Store = DEFAULT_STORE, model: Model = DEFAULT_MODEL, json: Json = False) -> None:
    """Show the model and the store: sizes, fingerprints, and whether they fit."""
    from softrag.cli.show import print_json

    hush_transformers()
    values: dict[str, Any] = {"model": _model(model), "store": _store(store)}
    if values["store"] is not None:
        values["fit"] = values["model"]["fingerprint"] == values["store"]["fingerprint"]
    if json:
        print_json(values)
        return
    table = Table(box=None, show_header=False, padding=(0, 2), pad_edge=False)
    for part in ("model", "store"):
        table.add_row(f"[bold]{part}", "")
        for name, value in (values[part] or {f"no store at {store}": ""}).items():
            table.add_row(f"  {name.replace('_', ' ')}", _readable(value))
    if "fit" in values:
        table.add_row("[bold]fit", "yes" if values["fit"] else "[red]no: another model's memories")
    Console().print(table)


def _model(model: str) -> dict[str, Any]:
    from softrag.checkpoint import locate, read_config

    # The config alone: no weights are needed to say what they are.
    folder = locate(model)
    config = read_config(folder)
    return {
        "checkpoint": str(folder),
        "fingerprint": config.fingerprint,
        "decoder": config.decoder,
        "compressor": config.compressor,
        "rate": config.rate,
        "max_document_tokens": config.max_document_tokens,
        "query_dependent": config.query_dependent,
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def _store(location: str) -> dict[str, Any] | None:
    from softrag.store import MemoryStore

    if "://" not in location and not Path(location).exists():
        return None
    with MemoryStore.open(location) as store:
        return {**asdict(store.info()), "sources": len(store.sources())}


def _readable(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
