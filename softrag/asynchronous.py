"""Async twins of blocking methods: the same signature, run in a thread. It knows no engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from functools import partial, wraps
from types import TracebackType
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from softrag.answer import Answer, AnswerStream
from softrag.documents import Hit


class HasThreads(Protocol):
    """An object that brings the threads its methods may block."""

    threads: Executor


Self = TypeVar("Self", bound=HasThreads)
P = ParamSpec("P")
T = TypeVar("T")


def async_twin(
    method: Callable[Concatenate[Self, P], T],
) -> Callable[Concatenate[Self, P], Awaitable[T]]:
    """Return a method that does the same without blocking the event loop."""

    @wraps(method)
    async def twin(self: Self, *args: P.args, **kwargs: P.kwargs) -> T:
        call = partial(method, self, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self.threads, call)

    _rename(twin, method)
    return twin


def async_stream_twin(
    method: Callable[Concatenate[Self, P], AnswerStream],
) -> Callable[Concatenate[Self, P], AsyncAnswerStream]:
    """Return a method whose stream is for `async for`; it begins at the first piece."""

    @wraps(method)
    def twin(self: Self, *args: P.args, **kwargs: P.kwargs) -> AsyncAnswerStream:
        return AsyncAnswerStream(partial(method, self, *args, **kwargs), self.threads)

    _rename(twin, method)
    return twin


def _rename(twin: Callable[..., object], method: Callable[..., object]) -> None:
    twin.__name__ = f"a{method.__name__}"
    twin.__qualname__ = method.__qualname__.replace(method.__name__, twin.__name__)
    twin.__doc__ = f"Do as `{method.__name__}`, without blocking the event loop."


class AsyncAnswerStream(AsyncIterator[str]):
    """An `AnswerStream` for `async for`; it runs in a thread, one piece at a time.

    Waiting for a piece can be cancelled, also by a timeout: `aclose` then stops the model after the
    piece it is at.
    """

    def __init__(self, start: Callable[[], AnswerStream], threads: Executor) -> None:
        self._start = start
        self._threads = threads
        self._stream: AnswerStream | None = None
        self._closed = False
        # A thread goes on with its piece when the task that waits for it is cancelled.
        self._lock = threading.Lock()

    @property
    def sources(self) -> list[Hit]:
        """The chunks the answer is made from; known from its first piece on."""
        return self._started().sources

    @property
    def answer(self) -> Answer:
        """The whole answer, once it is read; see `AnswerStream.answer`."""
        return self._started().answer

    async def __anext__(self) -> str:
        """Return the next piece."""
        piece = await asyncio.get_running_loop().run_in_executor(self._threads, self._next)
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """Stop the model; what was not read is lost."""
        self._closed = True
        if self._stream is not None or self._lock.locked():
            await asyncio.get_running_loop().run_in_executor(self._threads, self._close)

    async def __aenter__(self) -> AsyncAnswerStream:
        """Return itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the model if it still runs."""
        await self.aclose()

    def _next(self) -> str | None:
        # None for the end: StopIteration cannot leave a thread.
        with self._lock:
            if self._closed:
                return None
            if self._stream is None:
                self._stream = self._start()
            return next(self._stream, None)

    def _close(self) -> None:
        with self._lock:
            if self._stream is not None:
                self._stream.close()

    def _started(self) -> AnswerStream:
        if self._stream is None:
            raise RuntimeError("The stream has not begun: read its first piece first.")
        return self._stream
