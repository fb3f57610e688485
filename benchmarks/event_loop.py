"""How long the event loop is blocked while 32 questions are asked at once, and by what.

    python benchmarks/event_loop.py langchain --out benchmarks/results/2026-11-25-event-loop.json

Run it on a quiet machine: whatever else runs delays the loop, too. Where the loop stood when it was
late is printed with `--stacks`; a thread that could not look either means that some library held
Python's lock (GIL), or that the machine was busy.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean

from softrag import Document, SoftRAG
from softrag.bench.measure import commit
from softrag.cli.options import DEMO
from softrag.decoder.runner import Chosen, NewRow
from softrag.decoder.sampling import Biases

PACKAGES = ("torch", "transformers", "langchain-core", "llama-index-core", "softrag-memory")
QUESTIONS = json.loads((DEMO / "questions.json").read_text(encoding="utf-8"))
AT_ONCE = 32
TICK_S = 0.005
LATE_S = 0.03
Ask = Callable[[str], Awaitable[str]]


class Watch:
    """Measures an event loop's delays, and says where it stood while it was late."""

    def __init__(self) -> None:
        self.delays: list[float] = []
        # What the loop's thread computed in between: its own part of the delay.
        self.work: list[float] = []
        self.stacks: Counter[str] = Counter()
        self.watcher_delays: list[float] = []
        self.collections: list[tuple[int, float]] = []
        self._beat = time.perf_counter()
        self._main = threading.get_ident()
        self._done = False

    async def __aenter__(self) -> Watch:
        gc.callbacks.append(self._collecting)
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        self._task = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._done = True
        await self._task
        self._thread.join()
        gc.callbacks.remove(self._collecting)

    async def _tick(self) -> None:
        while not self._done:
            started, worked = time.perf_counter(), time.thread_time()
            await asyncio.sleep(TICK_S)
            self._beat = time.perf_counter()
            self.delays.append(self._beat - started - TICK_S)
            self.work.append(time.thread_time() - worked)

    def _look(self) -> None:
        while not self._done:
            started = time.perf_counter()
            time.sleep(TICK_S)
            now = time.perf_counter()
            self.watcher_delays.append(now - started - TICK_S)
            if now - self._beat > LATE_S:
                frames = traceback.extract_stack(sys._current_frames()[self._main])
                places = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-14:]]
                self.stacks["\n    ".join(places)] += 1

    def _collecting(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._collection = time.perf_counter()
        else:
            seconds = time.perf_counter() - self._collection
            self.collections.append((info["generation"], round(seconds, 4)))


def main() -> None:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("framework", choices=("langchain", "llama_index", "softrag"))
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--stacks", action="store_true")
    parser.add_argument("--freeze", action="store_true", help="gc.freeze() before the first run")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with SoftRAG.from_pretrained("softrag-demo", device="cpu") as engine:
        engine.add(
            Document(
                text=(DEMO / "corpus" / each["file"]).read_text(encoding="utf-8")[:1500],
                source=each["file"],
            )
            for each in QUESTIONS
        )
        batches = record_batches(engine)
        ask = {"langchain": langchain, "llama_index": llama_index, "softrag": plain}[
            options.framework
        ](engine)
        if options.freeze:
            gc.collect()
            gc.freeze()
        runs = asyncio.run(measure(ask, batches, options))
    result = {
        "framework": options.framework,
        "runs": runs,
        "device": f"cpu, {platform.machine()}, {os.cpu_count()} cores",
        "load average at the end": os.getloadavg(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit(),
        "command": "python " + " ".join(sys.argv),
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


async def measure(ask: Ask, batches: list[int], options: argparse.Namespace) -> list[dict]:
    """Ask all at once, several times; the first run pays for what is used first."""
    questions = [f"{QUESTIONS[n % len(QUESTIONS)]['question']} ({n})" for n in range(AT_ONCE)]
    runs = []
    for number in range(options.runs):
        batches.clear()
        started = time.perf_counter()
        async with Watch() as watch:
            await asyncio.gather(*map(ask, questions))
        delays = sorted(watch.delays)
        run = {
            "seconds": round(time.perf_counter() - started, 2),
            "longest block ms": round(1000 * delays[-1], 1),
            "longest work of the loop's thread ms": round(1000 * max(watch.work), 1),
            "second longest ms": round(1000 * delays[-2], 1),
            "99th percentile ms": round(1000 * delays[int(0.99 * len(delays))], 1),
            "longest delay of a thread that only sleeps ms": round(
                1000 * max(watch.watcher_delays), 1
            ),
            "requests a step": {
                "mean": round(mean(batches), 1),
                "most": max(batches),
                "steps": len(batches),
            },
            "full collections s": [s for generation, s in watch.collections if generation == 2],
        }
        runs.append(run)
        print(f"run {number}: {run}")
        if options.stacks:
            for stack, count in watch.stacks.most_common(4):
                print(f"  {count} x\n    {stack}")
    return runs


def record_batches(engine: SoftRAG) -> list[int]:
    """Write down how many requests each of the decoder's steps is made for."""
    assert engine.decoder is not None
    sizes: list[int] = []
    runner = engine.decoder._engine._runner
    step = runner.step

    def recorded(joining: Sequence[NewRow], biases: Biases) -> Chosen:
        chosen = step(joining, biases)
        sizes.append(runner.rows)
        return chosen

    runner.step = recorded
    return sizes


def plain(engine: SoftRAG) -> Ask:
    """Ask the engine itself."""

    async def ask(question: str) -> str:
        return (await engine.aask(question, k=3, max_new_tokens=12)).text

    return ask


def langchain(engine: SoftRAG) -> Ask:
    """Ask through LangChain."""
    from langchain_softrag import ChatSoftRAG, SoftRAGQdrantVectorStore, create_softrag_chain

    retriever = SoftRAGQdrantVectorStore(engine).as_retriever(k=3)
    chain = create_softrag_chain(retriever, ChatSoftRAG(engine=engine, max_tokens=12))

    async def ask(question: str) -> str:
        return (await chain.ainvoke(question))["answer"]

    return ask


def llama_index(engine: SoftRAG) -> Ask:
    """Ask through LlamaIndex."""
    from llama_index_softrag import SoftRAGQueryEngine

    query_engine = SoftRAGQueryEngine.from_store(engine, k=3, max_new_tokens=12)

    async def ask(question: str) -> str:
        return str(await query_engine.aquery(question))

    return ask


if __name__ == "__main__":
    main()
