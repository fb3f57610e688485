"""What the routes share: the tenants' engines, and running things in their turn and in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import Request

from softrag.answer import Answer
from softrag.asynchronous import AsyncAnswerStream
from softrag.engine import SoftRAG
from softrag.serve.admission import Admission
from softrag.serve.errors import ApiError
from softrag.serve.metrics import Metrics
from softrag.serve.settings import ServeSettings

T = TypeVar("T")

# Searches take milliseconds; this many keep the processor busy.
_SEARCHES = 8


class Service:
    """What a server works with, for as long as it runs.

    Args:
        engines: By tenant.
        settings: The server's.
    """

    def __init__(self, engines: Mapping[str, SoftRAG], settings: ServeSettings) -> None:
        self._engines = engines
        self.settings = settings
        self.metrics = Metrics()
        self.created = int(time.time())
        self.answers = Admission(running=settings.max_running, waiting=settings.max_waiting)
        self.searches = Admission(running=_SEARCHES, waiting=settings.max_waiting)
        # One after the other, because a document replaces another one of its source.
        self.writes = Admission(running=1, waiting=settings.max_waiting)
        for name, admission in (
            ("answers", self.answers),
            ("searches", self.searches),
            ("writes", self.writes),
        ):
            self._watch(name, admission)
        # What goes on after its response; kept, because a loop forgets tasks nobody holds.
        self._tasks: set[asyncio.Task[Any]] = set()

    def engine(self, request: Request) -> SoftRAG:
        """Return the engine of whoever asks, and no other."""
        return self._engines[request.state.tenant]

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something to its end, whoever waits for it."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def run(self, admission: Admission, work: Callable[[], Awaitable[T]], late: str) -> T:
        """Run something that cannot be stopped, in its turn; its place is taken until it ends.

        Args:
            admission: Where it waits.
            work: What to do.
            late: Said to the client when it takes longer than a request may.

        Raises:
            ApiError: 429 and 503 of `Admission`; 504 when it is late.
        """
        deadline = time.monotonic() + self.settings.timeout_s
        leave = await admission.enter(self.settings.timeout_s)

        async def run() -> T:
            try:
                return await work()
            finally:
                leave()

        task = self.start(run())
        done, _ = await asyncio.wait({task}, timeout=deadline - time.monotonic())
        if not done:
            # Its error would otherwise be reported as forgotten.
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
            raise ApiError(504, late, code="timeout")
        return task.result()

    async def close(self) -> None:
        """Wait for what still runs, and close the engines."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for engine in self._engines.values():
            await asyncio.to_thread(engine.close)

    def _watch(self, name: str, admission: Admission) -> None:
        self.metrics.watch(f"softrag_running_{name}", "Running now", lambda: admission.n_running)
        self.metrics.watch(
            f"softrag_waiting_{name}", "Waiting for a place", lambda: admission.n_waiting
        )


class RunningAnswer:
    """An answer that is being written: it has a place and a deadline, and stops when closed."""

    def __init__(
        self,
        service: Service,
        stream: AsyncAnswerStream,
        *,
        started: float,
        leave: Callable[[], None],
    ) -> None:
        self._service = service
        self._stream = stream
        self._started = started
        self._leave = leave
        self._is_first = True
        self._is_closed = False

    @classmethod
    async def start(cls, service: Service, stream: AsyncAnswerStream) -> RunningAnswer:
        """Wait for a place. The stream begins when its first piece is asked for."""
        started = time.monotonic()
        leave = await service.answers.enter(service.settings.timeout_s)
        return cls(service, stream, started=started, leave=leave)

    async def next(self) -> str | None:
        """Return the next piece, or None at the end.

        Raises:
            ApiError: 504 at the deadline.
        """
        limit = self._service.settings.timeout_s
        try:
            piece = await asyncio.wait_for(
                anext(self._stream), self._started + limit - time.monotonic()
            )
        except StopAsyncIteration:
            self._count(self._stream.answer)
            return None
        except asyncio.TimeoutError:
            raise ApiError(
                504, f"The answer took longer than {limit:.0f} s.", code="timeout"
            ) from None
        self._see_token()
        return piece

    def close(self) -> None:
        """Stop the model if it still runs; the place is free when it has."""
        if not self._is_closed:
            self._is_closed = True
            self._service.start(self._stop())

    async def _stop(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            self._leave()

    def _see_token(self) -> None:
        if self._is_first:
            self._is_first = False
            self._service.metrics.first_token_s.observe(time.monotonic() - self._started)

    def _count(self, answer: Answer) -> None:
        self._see_token()
        self._service.metrics.answer_s.observe(time.monotonic() - self._started)
        self._service.metrics.count(answer)


def service_of(request: Request) -> Service:
    """Return the server's service."""
    service: Service = request.app.state.service
    return service
