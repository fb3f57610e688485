"""The embedded store at size: ingest, bytes, search with fetch of five memories, memory, reopening.

    python benchmarks/store.py --out benchmarks/results/DATE-store.json

Memories have the demo model's shape, `(8, 576)` in bfloat16, and random values: what a store does
with them does not depend on the values. Sizes of other shapes and codecs follow, for
docs/sizing.md. Every part runs in a process of its own, so that memory and reopening are its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from softrag.bench.measure import commit
from softrag.codec import CODECS
from softrag.documents import Chunk, chunk_id
from softrag.memory import Memory, memory_key
from softrag.store import MemoryStore, migrate

PACKAGES = ("torch", "numpy", "qdrant-client", "softrag-memory")
MODEL = "f" * 32
DIMENSION = 384
BATCH = 64
SEED = 0


def main() -> None:
    """Measure, print a line each, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="Where the stores go; a temporary folder.")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    notes = Notes(options.out)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        large(folder, options.chunks, options.queries, notes)
        sizes(folder, notes)


def large(folder: Path, chunks: int, queries: int, notes: Notes) -> None:
    """Fill a store, and ask it in a fresh process."""
    raw = 8 * 576 * 2
    filled = alone(fill, folder / "large", chunks, 8, 576, "bf16")
    at = f"{chunks:,} chunks"
    notes.add(f"ingest, {at}", filled["chunks_per_second"], "chunks/s")
    notes.add(f"ingest, last tenth of {at}", filled["last_tenth"], "chunks/s")
    per_chunk = filled["bytes_on_disk"] / chunks
    notes.add(f"bytes on disk per chunk, {at}", per_chunk, "bytes", raw)
    notes.add(f"bytes on disk / raw bf16 values, {at}", per_chunk / raw, "ratio", 1)
    asked = alone(ask, folder / "large", chunks, queries)
    notes.add(f"reopen, {at}", asked["reopen_s"], "s")
    notes.add(f"resident memory after reopening, {at}", asked["resident"] / 2**20, "MiB")
    notes.add(f"peak memory of reopening and asking, {at}", asked["peak"] / 2**20, "MiB")
    # One pass over all search vectors, as fast as this machine's memory.
    floor = 1000 * asked["scan_s"]
    for name, values in (("search + 5 memories", asked["search"]), ("search alone", asked["bare"])):
        for point, quantile in (("p50", 50), ("p95", 95)):
            value = 1000 * statistics.quantiles(values, n=100)[quantile - 1]
            notes.add(f"{name}, {point}, {at}", value, "ms", floor)
    shutil.rmtree(folder / "large")


def sizes(folder: Path, notes: Notes, chunks: int = 1000) -> None:
    """Measure bytes on disk per chunk for widths of decoders and codecs."""
    for width in (576, 1024, 2048, 4096):
        for codec in CODECS:
            filled = alone(fill, folder / "sizes", chunks, 8, width, codec)
            value = filled["bytes_on_disk"] / chunks
            notes.add(f"bytes on disk per chunk, width {width}, {codec}", value, "bytes",
                      8 * width * 2)  # fmt: skip
            if codec == "bf16":
                moved = alone(move, folder / "sizes", folder / "moved")
                notes.add(f"migrate to int8, width {width}", moved, "chunks/s")
                shutil.rmtree(folder / "moved")
            shutil.rmtree(folder / "sizes")


def fill(folder: Path, chunks: int, memory: int, width: int, codec: str) -> dict[str, float]:
    """Store chunks with random memories; only the storing is timed."""
    with open_store(folder, codec=codec) as store:
        times = []
        for start in range(0, chunks, BATCH):
            batch = make_batch(start, min(BATCH, chunks - start), memory, width)
            began = time.perf_counter()
            store.upsert(*batch)
            times.append(time.perf_counter() - began)
        tenth = max(1, len(times) // 10)
        return {
            "chunks_per_second": chunks / sum(times),
            "last_tenth": tenth * BATCH / sum(times[-tenth:]),
            "bytes_on_disk": store.info().bytes_on_disk or 0,
        }


def ask(folder: Path, chunks: int, queries: int) -> dict[str, object]:
    """Open a store and search it, with and without memories."""
    began = time.perf_counter()
    with open_store(folder) as store:
        reopen = time.perf_counter() - began
        resident = memory_of_process("VmRSS")
        rng = np.random.default_rng(SEED + 1)
        vectors = unit(rng.normal(size=(queries, DIMENSION)))
        store.search(vectors[0], 5)
        times: dict[bool, list[float]] = {True: [], False: []}
        for vector in vectors:
            for with_memories in (True, False):
                began = time.perf_counter()
                hits = store.search(vector, 5, with_memories=with_memories)
                times[with_memories].append(time.perf_counter() - began)
                assert len(hits) == 5
                assert all((hit.memory is not None) == with_memories for hit in hits)
    matrix = np.ones((chunks, DIMENSION), np.float32)
    began = time.perf_counter()
    for _ in range(10):
        matrix @ vectors[0]
    return {
        "reopen_s": reopen,
        "resident": resident,
        "peak": memory_of_process("VmHWM"),
        "search": times[True],
        "bare": times[False],
        "scan_s": (time.perf_counter() - began) / 10,
    }


def move(source: Path, target: Path) -> float:
    """Return chunks a second of a migration to int8."""
    with open_store(source) as old, open_store(target, codec="int8") as new:
        began = time.perf_counter()
        report = migrate(old, new)
        return report.chunks_copied / (time.perf_counter() - began)


def open_store(folder: Path, *, codec: str | None = None) -> MemoryStore:
    """Open a store that fits the chunks of `make_batch`."""
    return MemoryStore.open(
        folder, fingerprint=MODEL, embedder="random", dimension=DIMENSION, codec=codec
    )


def make_batch(
    start: int, count: int, memory: int, width: int
) -> tuple[list[Chunk], np.ndarray, list[Memory]]:
    """Return chunks as the demo corpus has them, with random vectors and memories."""
    rng = np.random.default_rng([SEED, start])
    generator = torch.Generator().manual_seed(SEED + start)
    values = torch.randn(count, memory, width, generator=generator).to(torch.bfloat16)
    letters = rng.integers(97, 123, size=(count, 500), dtype=np.uint8)
    chunks, memories = [], []
    for row in range(count):
        text = letters[row].tobytes().decode()
        source = f"/documents/{(start + row) // 20}.md"
        chunks.append(
            Chunk(
                id=chunk_id(source, text), text=text, source=source, title="A title", n_tokens=128
            )
        )
        memories.append(
            Memory(
                values=values[row],
                key=memory_key(MODEL, text),
                fingerprint=MODEL,
                n_document_tokens=128,
            )
        )
    return chunks, unit(rng.normal(size=(count, DIMENSION))), memories


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors of length 1, float32."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def memory_of_process(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def alone(function: Callable, *arguments: object):  # noqa: ANN201 - what the function returns
    """Run a function in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


class Notes:
    """Measures, written after each, so that a run cut short leaves its part."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.values: list[dict] = []
        self.commit = commit()

    def add(self, name: str, value: float, unit: str, floor: float | None = None) -> None:
        """Note and print a measure."""
        self.values.append(
            {
                "name": name,
                "value": round(value, 4),
                "unit": unit,
                "floor": None if floor is None else round(floor, 4),
                "device": f"{platform.processor() or platform.machine()}, CPU",
                "versions": {package: version(package) for package in PACKAGES},
                "commit": self.commit,
                "command": "python " + " ".join(sys.argv),
                "seed": SEED,
            }
        )
        self.out.write_text(json.dumps(self.values, indent=1) + "\n")
        print(f"{name}: {value:.4g} {unit}", flush=True)


if __name__ == "__main__":
    main()
