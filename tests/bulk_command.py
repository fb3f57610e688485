"""Run as a script, by a launcher: the `softrag` command whose workers have a small embedder."""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import softrag.bulk
from softrag.cli import main
from tests.bulk_workers import MortalEmbedder


def load_late(device: str) -> MortalEmbedder:
    """Take longer than another process needs for all of the work and its own end."""
    time.sleep(5)
    return MortalEmbedder(device)


if __name__ == "__main__":
    late = os.environ.get("LATE_RANK") == os.environ["RANK"]
    embedder = load_late if late else MortalEmbedder
    softrag.bulk.WorkerSetup = partial(softrag.bulk.WorkerSetup, embedder=embedder)
    main()
