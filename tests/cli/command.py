"""The `softrag` command in this process, with a tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from softrag.cli import app
from tests.checkpoints import build_checkpoint


def run(*arguments: object, store: Path, seed: int = 0, input: str | bytes | None = None) -> Result:
    """Run a command on a store, with the checkpoint of a seed."""
    environment = {"SOFTRAG_STORE": str(store), "SOFTRAG_MODEL": str(build_checkpoint(seed=seed))}
    return CliRunner().invoke(app, [str(each) for each in arguments], env=environment, input=input)
