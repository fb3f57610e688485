"""Running the demos as their docstrings say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_readme import CHECKPOINT

ROOT = Path(__file__).parents[2]
DEMOS = sorted((ROOT / "demos").glob("*.py"))
SOURCES = (ROOT, ROOT / "integrations", ROOT / "trainers")


def run_demo(name: str) -> str:
    """Run a demo on the shipped model, and return what it prints."""
    if not CHECKPOINT.exists():
        pytest.skip("the demo checkpoint is not in this tree")
    done = subprocess.run(
        [sys.executable, f"demos/{name}"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "400", "PYTHONPATH": os.pathsep.join(map(str, SOURCES))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
