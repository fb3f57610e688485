"""Run as a script: the `softrag` command with the tests' small embedder.

`KILL_AT_BATCH=n` kills the process (-9) while batch n is being indexed.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import softrag.engine
from softrag.cli import main
from tests.embedders import HashingEmbedder


class KillingEmbedder(HashingEmbedder):
    batches = 0

    def embed_documents(self, texts):
        self.batches += 1
        if self.batches == int(os.environ.get("KILL_AT_BATCH", "0")):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().embed_documents(texts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    softrag.engine.default_embedder = KillingEmbedder
    main()
