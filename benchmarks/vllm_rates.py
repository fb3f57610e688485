"""Answers per second of vLLM on a CPU and of the decoder in this process, with the demo model.

    python -m benchmarks.vllm_rates --python .venv-vllm/bin/python --dtype float32 --out FILE

All have the same cores, weights, prompts and lengths of answers, and take turns, so that other
work on the machine slows all alike; figures are medians of the rounds. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.vllm_cpu import CONCURRENT, EMBEDS, Note, endless, load_torch, noter, open_url
from softrag import DecodeRequest, TorchDecoder, VLLMDecoder
from softrag.export import cached_export
from tests.vllm.questions import ask_demo
from tests.vllm.server import VLLMProcess

TOKENS = 32
STATIC = "static batch in process"
CONTINUOUS = "continuous batch in process"
FIRST, FIXED, MIXED = "1 token each", f"{TOKENS} tokens each", "4 to 64 tokens"
LOADS = {
    FIRST: [1] * CONCURRENT,
    FIXED: [TOKENS] * CONCURRENT,
    MIXED: [4 + n * 60 // (CONCURRENT - 1) for n in range(CONCURRENT)],
}
SERVERS = ("eager", "compiled")
# By the start of their command lines.
PROCESSES = {
    "VLLM::Worker": "vLLM's worker",
    "VLLM::EngineCore": "vLLM's engine",
    "": "vLLM's HTTP process",
}
# vLLM's processes may wait in busy loops for a second after their last work.
SETTLE_S = 1.2
Decoder = TorchDecoder | VLLMDecoder


class Cost(NamedTuple):
    """What some work took.

    Attributes:
        seconds: On the clock.
        cpu: Of processors, by process.
    """

    seconds: float
    cpu: dict[str, float]


Costs = dict[tuple[str, str], list[Cost]]


def main() -> None:
    """Measure, print a line each, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="of the environment with vLLM")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--minutes", type=float, default=10, help="to take in all")
    parser.add_argument(
        "--servers", nargs="+", choices=SERVERS, default=SERVERS, help="kinds of vLLM servers"
    )
    parser.add_argument("--store", default=":memory:", help="folder to keep the index in")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    note = noter(options.out, options.python, "benchmarks.vllm_rates")
    dtype = getattr(torch, options.dtype)
    requests = ask_demo(n=CONCURRENT, store=options.store)
    exported = cached_export("softrag-demo", dtype=dtype)
    rivals: dict[str, Decoder] = {
        STATIC: load_torch(dtype, fused=False),
        CONTINUOUS: load_torch(dtype),
    }
    servers: dict[str, VLLMProcess] = {}
    with ExitStack() as stack:
        for kind in options.servers:
            server = VLLMProcess(
                exported,
                flags=EMBEDS,
                dtype=options.dtype,
                python=options.python,
                compiled=kind == "compiled",
            )
            name = f"vLLM over HTTP, {kind}"
            servers[name] = stack.enter_context(server)
            rivals[name] = stack.enter_context(open_url(server))
        costs = compare(deadline, rivals, servers, requests)
    note(f"rounds, {options.dtype}", len(costs[STATIC, FIXED]), "rounds")
    for rival in rivals:
        report(note, options.dtype, rival, costs)


def compare(
    deadline: float,
    rivals: Mapping[str, Decoder],
    servers: Mapping[str, VLLMProcess],
    requests: Sequence[DecodeRequest],
) -> Costs:
    """Return what each rival's answers of each load cost, round by round."""
    costs: Costs = {(rival, load): [] for rival in rivals for load in LOADS}
    with endless(*rivals.values()):
        one_round(rivals, servers, requests)  # Warms up.
        started = time.monotonic()
        rounds = 0
        # Another round while there is time for it.
        while not rounds or time.monotonic() + (time.monotonic() - started) / rounds < deadline:
            for key, cost in one_round(rivals, servers, requests).items():
                costs[key].append(cost)
            rounds += 1
    return costs


def one_round(
    rivals: Mapping[str, Decoder],
    servers: Mapping[str, VLLMProcess],
    requests: Sequence[DecodeRequest],
) -> dict[tuple[str, str], Cost]:
    """Let each rival answer each load once."""
    costs = {}
    for load, lengths in LOADS.items():
        asked = [replace(each, max_new_tokens=n) for each, n in zip(requests, lengths, strict=True)]
        for rival, decoder in rivals.items():
            time.sleep(SETTLE_S)
            cost = measure(partial(decoder.generate, asked), servers.get(rival))
            cpu = ", ".join(f"{name} {s:.2f}" for name, s in cost.cpu.items())
            print(f"  {load}, {rival}: {cost.seconds:.2f} s ({cpu})", flush=True)
            costs[rival, load] = cost
    return costs


def report(note: Note, dtype: str, rival: str, costs: Costs) -> None:
    """Note one rival's medians, and those of its ratios to the decoder in this process."""
    start = f"{rival}, {dtype}"
    seconds = {load: [cost.seconds for cost in costs[rival, load]] for load in LOADS}
    for load in (FIXED, MIXED):
        note(f"{start}, {load}", CONCURRENT / median(seconds[load]), "answers/s")
        note(f"{start}, {load}: slowest round over fastest",
             max(seconds[load]) / min(seconds[load]), "times")  # fmt: skip
        for other in (STATIC, CONTINUOUS):
            if rival not in (STATIC, other):
                ratios = [
                    theirs.seconds / mine
                    for theirs, mine in zip(costs[other, load], seconds[load], strict=True)
                ]
                bar = 1.8 if other == STATIC and rival != CONTINUOUS else None
                note(f"{start}, {load}: times the {other}", median(ratios), "ratio", bar)
    note(f"{start}: {CONCURRENT} prompts and first tokens", median(seconds[FIRST]), "s")
    steps = [
        (whole - first) / (TOKENS - 1)
        for whole, first in zip(seconds[FIXED], seconds[FIRST], strict=True)
    ]
    note(f"{start}: a step of {CONCURRENT} tokens", 1000 * median(steps), "ms")
    for process in costs[rival, FIXED][0].cpu:
        used = [cost.cpu[process] for cost in costs[rival, FIXED]]
        note(f"{start}, {FIXED}: processor time of {process}", median(used), "s")


def measure(run: Callable[[], object], server: VLLMProcess | None) -> Cost:
    """Run, and return what it took here and in a server's processes."""
    before, started = processor_seconds(server), time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    after = processor_seconds(server)
    return Cost(seconds, {name: after[name] - before[name] for name in after})


def processor_seconds(server: VLLMProcess | None) -> dict[str, float]:
    """Return processor time since the start of this process and of a server's."""
    seconds = {"this process": time.process_time()}
    if server is None:
        return seconds
    seconds |= dict.fromkeys(PROCESSES.values(), 0.0)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # From the third field on, the state.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            title = (folder / "cmdline").read_text()
        except OSError:
            continue  # It ended.
        if int(fields[3]) == server.pid:  # the session
            name = next(PROCESSES[start] for start in PROCESSES if title.startswith(start))
            ticks = int(fields[11]) + int(fields[12])
            seconds[name] += ticks / os.sysconf("SC_CLK_TCK")
    return seconds


if __name__ == "__main__":
    main()
