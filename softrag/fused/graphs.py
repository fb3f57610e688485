"""CUDA graphs of a function, one per shape, captured when first needed. It knows no model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from time import perf_counter
from typing import Any, TypeVar

import torch

logger = logging.getLogger(__name__)

Output = TypeVar("Output")


class GraphSet:
    """Replays captured work, so that hundreds of launches cost the host one.

    What is captured reads and writes tensors that stay where they are; graphs share one memory
    for what lies between, so an output holds until the next replay.
    """

    def __init__(self) -> None:
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def run(self, key: Hashable, work: Callable[[], Output]) -> Output:
        """Do some work, from its graph if there is one.

        Args:
            key: The work's shapes.
            work: Returns tensors. Doing it twice must be the same as doing it once: the first
                time it is done and then captured.
        """
        if key not in self._captured:
            self._captured[key] = self._capture(key, work)
        graph, output = self._captured[key]
        graph.replay()
        return output

    def _capture(
        self, key: Hashable, work: Callable[[], Output]
    ) -> tuple[torch.cuda.CUDAGraph, Output]:
        started = perf_counter()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Kernels are compiled and handles made outside the capture.
            work()
            self._stream.synchronize()
            # Other threads may go on using the device.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = work()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        logger.debug("captured %s in %.2f s", key, perf_counter() - started)
        return graph, output
