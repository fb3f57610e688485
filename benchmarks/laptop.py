"""What the demo model costs on a CPU: indexing, storage, asking.

    python benchmarks/laptop.py --out benchmarks/results/2026-11-25-laptop.json

Run it on a quiet machine. Chunks are 128 compressor tokens long, cut from the demo corpus.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

from softrag import Document, SoftRAG
from softrag.bench.measure import commit
from softrag.cli.options import DEMO

PACKAGES = ("torch", "transformers", "qdrant-client", "softrag-memory")


def main() -> None:
    """Measure, print a line each, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    results: list[dict] = []
    device = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"

    def note(name: str, value: float, unit: str, floor: float | None = None) -> None:
        results.append(
            {
                "name": name,
                "value": round(value, 4),
                "unit": unit,
                "floor": None if floor is None else round(floor, 4),
                "device": device,
                "versions": {package: version(package) for package in PACKAGES},
                "commit": commit(),
                "command": "python " + " ".join(sys.argv),
                "seed": 0,
            }
        )
        print(f"{name}: {value:.4g} {unit}" + ("" if floor is None else f" (floor {floor:.4g})"))

    with tempfile.TemporaryDirectory() as folder:
        rag = SoftRAG.from_pretrained("softrag-demo", store=folder, device="cpu")
        documents = full_chunks(rag, options.chunks)
        rag.embedder.embed_query("warm")
        rag.compressor.compress([documents[0].text])
        started = time.perf_counter()
        report = rag.add(documents)
        seconds = time.perf_counter() - started
        note("index, chunks of 128 tokens", report.chunks_added / seconds, "chunks/s",
             compute_floor(rag))  # fmt: skip
        hit = next(iter(rag.store.scroll()))
        raw = hit.memory.nbytes
        info = rag.store.info()
        note("memory, raw bf16", raw, "bytes")
        note("memory, as stored", stored_bytes(rag), "bytes")
        note("store on disk per chunk, all included", info.bytes_on_disk / info.chunks, "bytes")
        ask(rag, note)
        rag.store.close()
    options.out.write_text(json.dumps(results, indent=1) + "\n")


def full_chunks(rag: SoftRAG, count: int) -> list[Document]:
    """Cut the demo corpus into texts of exactly 128 compressor tokens or one less."""
    tokenizer = rag.compressor.model.compressor_tokenizer
    text = "\n".join(path.read_text() for path in sorted((DEMO / "corpus").glob("*.*")))
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    pieces = [tokenizer.decode(ids[i : i + 128]) for i in range(0, len(ids) - 128, 128)]
    return [Document(text=piece, source=str(i)) for i, piece in enumerate(pieces[:count])]


def compute_floor(rag: SoftRAG) -> float:
    """Chunks per second if the compressor's matrix products were all the work."""
    weights = sum(p.numel() for p in rag.compressor.model.compressor.layers.parameters())
    dtype = rag.compressor.model.memory_embedding.dtype
    a, b = torch.randn(2048, 576, dtype=dtype), torch.randn(576, 1536, dtype=dtype)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    rate = 2 * 2048 * 576 * 1536 / statistics.median(times)
    return rate / (2 * weights * 136)


def stored_bytes(rag: SoftRAG) -> int:
    """Length of one memory's payload string."""
    from softrag.store.payload import MEMORY_FIELD

    points, _ = rag.store.client.scroll(rag.store.collection, limit=1)
    return len(points[0].payload[MEMORY_FIELD])


def ask(rag: SoftRAG, note) -> None:  # noqa: ANN001
    """Ask the demo's questions from memories and from text."""
    questions = [record["question"] for record in json.loads((DEMO / "questions.json").read_text())]
    for mode in ("memory", "text"):
        rag.ask(questions[0], mode=mode, max_new_tokens=20)
        answers = [rag.ask(question, mode=mode, max_new_tokens=20) for question in questions]
        first = statistics.median(answer.timings.first_token_s for answer in answers)
        per_token = statistics.median(
            (answer.timings.total_s - answer.timings.first_token_s)
            / max(1, answer.usage.completion_tokens - 1)
            for answer in answers
        )
        note(f"ask, {mode}: to first word", first, "s")
        note(f"ask, {mode}: 20-token answer", first + 19 * per_token, "s")
        note(
            f"ask, {mode}: prompt",
            statistics.mean(a.usage.prompt_tokens for a in answers),
            "tokens",
        )


if __name__ == "__main__":
    main()
