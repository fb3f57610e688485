"""CUDA graphs of a function, one per shape, captured when first needed. It knows no model."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, TypeVar

import torch

logger = logging.getLogger(__name__)

Output = TypeVar("Output")


class GraphSet:
    """Replays captured work, so that hundreds of launches cost the host one.

    What is captured reads and writes tensors that stay where they are; graphs share one memory
    for what lies between, so an output holds until the next replay.

    Args:
        device: The GPU, which must be the current one wherever work is run.
    """

    def __init__(self, device: torch.device) -> None:
        # None: this one can't be captured.
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any] | None] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def run(self, key: Hashable, work: Callable[[], Output]) -> Output:
        """Do some work, from its graph if there is one.

        Args:
            key: The work's shapes.
            work: Returns tensors. Doing it twice must be the same as doing it once: the first
                time it is done and then captured.
        """
        if key not in self._captured:
            self._captured[key] = self._try_to_capture(key, work)
        captured = self._captured[key]
        if captured is None:
            return work()
        graph, output = captured
        graph.replay()
        return output

    def _try_to_capture(
        self, key: Hashable, work: Callable[[], Output]
    ) -> tuple[torch.cuda.CUDAGraph, Output] | None:
        started = perf_counter()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Kernels are compiled and handles made outside the capture; errors of the work itself
            # come up here.
            work()
            self._stream.synchronize()
            try:
                with _no_collection():
                    # Other threads may go on using the device.
                    graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                    try:
                        output = work()
                    finally:
                        graph.capture_end()
            except RuntimeError as error:
                logger.warning("%s runs without a CUDA graph: %s", key, error)
                return None
        current.wait_stream(self._stream)
        logger.debug("captured %s in %.2f s", key, perf_counter() - started)
        return graph, output


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from freeing device memory in the middle of a capture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
