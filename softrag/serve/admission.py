"""How many may run and wait at the same time. It knows nothing of what they do."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable

from softrag.serve.errors import ApiError


class Admission:
    """A bounded queue, first come first served. Used from one event loop.

    Args:
        running: How many run at the same time.
        waiting: How many may wait for a place; more are refused.
    """

    def __init__(self, *, running: int, waiting: int) -> None:
        self._limit = running
        self._max_waiting = waiting
        self._running = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        # How long one runs, as a moving mean.
        self._seconds = 1.0

    @property
    def n_running(self) -> int:
        """How many run."""
        return self._running

    @property
    def n_waiting(self) -> int:
        """How many wait."""
        return len(self._queue)

    async def enter(self, timeout_s: float) -> Callable[[], None]:
        """Wait for a place.

        Returns:
            To be called once, when the place is free again.

        Raises:
            ApiError: 429 when too many wait, 503 when no place came free in time.
        """
        loop = asyncio.get_running_loop()
        if self._running < self._limit:
            self._running += 1
        else:
            if len(self._queue) >= self._max_waiting:
                raise self._busy(429, f"{len(self._queue)} requests wait already")
            turn = loop.create_future()
            self._queue.append(turn)
            try:
                # Not `wait_for`, which may lose a place that comes free as it gives up.
                await asyncio.wait({turn}, timeout=timeout_s)
            except asyncio.CancelledError:
                if turn.done():
                    self._pass_on()
                raise
            finally:
                if not turn.done():
                    self._queue.remove(turn)
            if not turn.done():
                raise self._busy(503, f"No place came free in {timeout_s:.0f} s")
        entered = loop.time()

        def leave() -> None:
            self._seconds += 0.1 * (loop.time() - entered - self._seconds)
            self._pass_on()

        return leave

    def _pass_on(self) -> None:
        if self._queue:
            self._queue.popleft().set_result(None)
        else:
            self._running -= 1

    def _busy(self, status: int, reason: str) -> ApiError:
        retry_s = max(1, math.ceil(self._seconds * (len(self._queue) + 1) / self._limit))
        return ApiError(
            status,
            f"The server is at its limit: {reason}. Ask again in {retry_s} s.",
            code="overloaded",
            headers={"Retry-After": str(retry_s)},
        )
