"""Run as a script, by a launcher: the `softrag` command whose workers have a small embedder."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import softrag.bulk
from softrag.cli import main
from tests.bulk_workers import MortalEmbedder

if __name__ == "__main__":
    softrag.bulk.WorkerSetup = partial(softrag.bulk.WorkerSetup, embedder=MortalEmbedder)
    main()
