"""What bulk workers load in tests: embedders that fail or kill their process, each in its way."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from tests.embedders import HashingEmbedder


class MortalEmbedder(HashingEmbedder):
    """Dies (-9) after compressing a batch and before it is stored.

    Args:
        device: Not used.
        kills: A folder of files named after batches: who comes to one removes it and dies.
    """

    def __init__(self, device: str, kills: Path | None = None) -> None:
        self.kills = kills
        self.batches = 0

    def embed_documents(self, texts: list[str]):
        self.batches += 1
        if self.kills is not None:
            try:
                (self.kills / str(self.batches)).unlink()
            except FileNotFoundError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        if any("deadly" in text for text in texts):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().embed_documents(texts)


class ThreadCountingEmbedder(HashingEmbedder):
    """Notes how many threads its process computes with.

    Args:
        device: Not used.
        notes: A folder: a file for each process that embedded something.
    """

    def __init__(self, device: str, notes: Path) -> None:
        self.notes = notes

    def embed_documents(self, texts: list[str]):
        threads = f"{torch.get_num_threads()} {os.environ.get('RAYON_NUM_THREADS')}"
        (self.notes / str(os.getpid())).write_text(threads)
        return super().embed_documents(texts)


class UnreachableEmbedder(HashingEmbedder):
    """Fails as one whose vectors come from a server that is down."""

    def __init__(self, device: str) -> None:
        """Make one, wherever it is to run."""

    def embed_documents(self, texts: list[str]):
        raise ConnectionRefusedError("the embedding server refused")
