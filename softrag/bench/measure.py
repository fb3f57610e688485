"""Timing, the hardware's own limits, and result records. It knows no model."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

import torch

PACKAGES = ("torch", "triton", "transformers", "peft", "qdrant-client", "softrag-memory")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measured number; the fields of every result file.

    Attributes:
        name: What was measured.
        value: The median, in `unit`.
        unit: Such as "s", "documents/s" or "tokens/s".
        floor: The same number if the hardware's limit were all that counts (an upper bound where
            `unit` is a rate); None where none applies.
        device: What it ran on.
        versions: Of the libraries.
        commit: Of softrag.
        command: That measured it.
        seed: Of weights and inputs.
    """

    name: str
    value: float
    unit: str
    floor: float | None
    device: str
    versions: dict[str, str]
    commit: str
    command: str
    seed: int

    @property
    def ratio(self) -> float | None:
        """How many times the floor it takes; 1.0 is perfect."""
        if not self.floor:
            return None
        return self.floor / self.value if self.unit.endswith("/s") else self.value / self.floor


@dataclass(kw_only=True)
class Recorder:
    """Collects results, and says each as it comes.

    Attributes:
        device: Where things run.
        seed: Of weights and inputs.
        say: Takes a line for people.
        path: A JSON file kept up to date, if any.
    """

    device: torch.device
    seed: int = 0
    say: Callable[[str], None] = lambda line: None
    path: Path | None = None
    results: list[Result] = field(default_factory=list)

    def add(self, name: str, value: float, unit: str, floor: float | None = None) -> Result:
        """Record one number."""
        result = Result(
            name=name,
            value=float(f"{value:.5g}"),
            unit=unit,
            floor=None if floor is None else float(f"{floor:.5g}"),
            device=describe(self.device),
            versions=installed(),
            commit=commit(),
            command=command(),
            seed=self.seed,
        )
        self.results.append(result)
        line = f"{name}: {value:.4g} {unit}"
        if result.ratio is not None:
            line += f" (hardware limit {floor:.4g}, {result.ratio:.2f} times that)"
        self.say(line)
        if self.path is not None:
            self.path.write_text(json.dumps([asdict(r) for r in self.results], indent=1) + "\n")
        return result


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What this device does at best, measured.

    Attributes:
        bandwidth: Bytes per second of a large copy, read and written bytes counted.
        matmul: Floating point operations per second of a large matrix product.
    """

    bandwidth: float
    matmul: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> Hardware:
        """Measure a device in a second or two."""
        on_gpu = device.type == "cuda"
        source = torch.empty(2**31 if on_gpu else 2**27, dtype=torch.uint8, device=device)
        source.random_()
        target = torch.empty_like(source)
        copy = median_seconds(partial(target.copy_, source), device, repeat=10)
        bandwidth = 2 * source.numel() / copy
        del source, target
        size = 8192 if on_gpu else 1024
        a = torch.randn(size, size, device=device).to(dtype)
        b = torch.randn(size, size, device=device).to(dtype)
        product = median_seconds(lambda: a @ b, device, repeat=10)
        return cls(bandwidth=bandwidth, matmul=2 * size**3 / product)

    def seconds(self, *, nbytes: float = 0.0, flops: float = 0.0) -> float:
        """Return the least time for moving bytes and computing, each of which may bound it."""
        return max(nbytes / self.bandwidth, flops / self.matmul)


def median_seconds(
    work: Callable[[], object], device: torch.device, *, repeat: int = 5, warmup: int = 2
) -> float:
    """Return the median time of some work, the device's work included."""
    for _ in range(warmup):
        work()
    times = []
    for _ in range(repeat):
        synchronize(device)
        started = perf_counter()
        work()
        synchronize(device)
        times.append(perf_counter() - started)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    """Wait for what the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Measure the most bytes allocated on a GPU from here on; 0 on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield lambda: torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def describe(device: torch.device) -> str:
    """Return what a device is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def installed() -> dict[str, str]:
    """Return the versions of the libraries that matter, where installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return softrag's commit, or "" where it is not a checkout or there is no git."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def command() -> str:
    """Return how this program was started."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
