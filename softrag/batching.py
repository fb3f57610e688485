"""Concurrent calls grouped into one. It knows nothing of models."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class MicroBatcher(Generic[Item, Result]):
    """Runs a batched function for callers that each bring one item.

    Items that arrive within a short window, or while a batch is running, are run together.

    Args:
        run: Takes items, returns one result each, in order.
        window_s: How long the first item of a batch waits for others.
        batch_size: Most items in one batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        window_s: float = 0.005,
        batch_size: int = 64,
    ) -> None:
        self._run = run
        self._window_s = window_s
        self._batch_size = batch_size
        self._waiting: list[tuple[Item, Future[Result]]] = []
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="softrag-batch")

    def __call__(self, item: Item) -> Result:
        """Return the item's result; errors are the item's own."""
        future: Future[Result] = Future()
        with self._lock:
            self._waiting.append((item, future))
        # One visit of the worker for every item; visits that find nothing left end at once.
        self._worker.submit(self._visit)
        return future.result()

    def close(self) -> None:
        """Finish what waits and stop the worker."""
        self._worker.shutdown()

    def _visit(self) -> None:
        if not self._waiting:
            return
        time.sleep(self._window_s)
        with self._lock:
            batch = self._waiting[: self._batch_size]
            del self._waiting[: self._batch_size]
        try:
            results = self._run([item for item, _ in batch])
        except BaseException as error:
            self._fail(batch, error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)

    def _fail(self, batch: list[tuple[Item, Future[Result]]], error: BaseException) -> None:
        if len(batch) == 1:
            batch[0][1].set_exception(error)
            return
        # One bad item must not fail its neighbours: run them one by one.
        for item, future in batch:
            try:
                future.set_result(self._run([item])[0])
            except BaseException as own:
                future.set_exception(own)
