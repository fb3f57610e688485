"""Index with Ray Data on a cluster: readers split files, GPU actors compress and store.

    python deploy/ray_index.py s3://bucket/documents/*.jsonl --store http://qdrant:6333 --gpus 8

Needs `pip install 'ray[data]'`. The store must be a Qdrant server: every actor writes to it. Chunks
are stored under their content address, so Ray's retries and a second run store nothing twice, and
compress nothing twice. What is gone from a document is deleted by `softrag index`, not here.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import numpy as np
import ray

from softrag import Document
from softrag.bulk import StoreAddress, WorkerSetup, load_indexer


class Index:
    """One actor: a model on its GPU, and a connection to the store."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.setup = setup
        # Ray shows each actor its own GPU only, as the first.
        self.indexer = load_indexer(setup, worker=0)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Store what is new of a batch of documents; return how much that was."""
        names = [name for name in ("source", "title") if name in batch]
        documents = [
            Document(
                text=text, **{n: None if batch[n][i] is None else str(batch[n][i]) for n in names}
            )
            for i, text in enumerate(batch["text"])
        ]
        tally = self.indexer.run(documents, batch_size=self.setup.chunks_per_batch)
        return {
            "documents": [tally.documents],
            "chunks_added": [tally.added],
            "chunks_unchanged": [tally.unchanged],
            "left_out": [len(tally.errors)],
        }


def main() -> None:
    """Read JSON lines with a `text`, and if wanted a `source` and a `title`; index them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", help="JSON lines files, wherever Ray can read them.")
    parser.add_argument("--store", required=True, help="URL of a Qdrant server.")
    parser.add_argument("--model", default="softrag-demo")
    parser.add_argument("--gpus", type=int, default=0, help="Actors with a GPU each; 0 uses CPUs.")
    parser.add_argument("--actors", type=int, default=1, help="Actors without a GPU, a CPU each.")
    parser.add_argument("--batch", type=int, default=2048, help="Documents given to an actor.")
    options = parser.parse_args()

    setup = WorkerSetup(
        checkpoint=options.model, store=StoreAddress(location=options.store), threads=1
    )
    counts = ray.data.read_json(options.paths, lines=True).map_batches(
        Index,
        fn_constructor_kwargs={"setup": setup},
        batch_size=options.batch,
        num_gpus=1 if options.gpus else 0,
        compute=ray.data.ActorPoolStrategy(size=options.gpus or options.actors),
    )
    totals: Counter[str] = Counter()
    for row in counts.iter_rows():
        totals.update(row)
    print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in totals.items()))


if __name__ == "__main__":
    main()
