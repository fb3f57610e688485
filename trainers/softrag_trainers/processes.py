"""What the processes of one run tell each other, through the hosts.

Through GPUs every word would wait for the computations before it.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import distributed


def take_device() -> None:
    """Make the GPU of this process the one that models are loaded to."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def total(count: float) -> float:
    """Return the sum of all processes' counts."""
    if not distributed.is_initialized():
        return count
    counts = torch.tensor(count, dtype=torch.float64)
    distributed.all_reduce(counts, group=_hosts())
    return float(counts)


def agree(value: float) -> float:
    """Return the first process's value."""
    if not distributed.is_initialized():
        return value
    said = torch.tensor(value, dtype=torch.float64)
    distributed.broadcast(said, src=0, group=_hosts())
    return float(said)


@cache
def _hosts() -> distributed.ProcessGroup:
    group: Any = distributed.new_group(backend="gloo")
    return group
