"""A pool of threads for event loops. It knows nothing of what runs in it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class LoopThreads(Executor):
    """A thread pool whose `submit` does not wait for new threads to start.

    That of `ThreadPoolExecutor` does, and a new thread starts when it gets Python's lock: with
    computing threads beside it that is milliseconds for each, and 32 questions of the same moment
    would start 32 threads before their event loop went on. Here another thread hands them over,
    through a queue, because `submit` also takes a lock that all pools of a process share.

    Args:
        max_workers: Most threads.
        name: Begins their names.
    """

    def __init__(self, max_workers: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers, thread_name_prefix=name)
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = Lock()
        # A daemon, and without a reference to this object: one that is forgotten ends, too.
        self._starter = Thread(
            target=_hand_over, args=(self._calls, self._pool), name=f"{name}-starter", daemon=True
        )
        self._starter.start()
        self._end = weakref.finalize(self, self._calls.put, None)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a call in a thread; see `Executor.submit`."""
        future: Future[T] = Future()
        with self._lock:
            if not self._end.alive:
                raise RuntimeError("No calls are taken after the shutdown of these threads.")
            self._calls.put(partial(_run, future, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Finish what was submitted, whatever `cancel_futures` says, and end the threads."""
        with self._lock:
            self._end()
        self._starter.join()
        self._pool.shutdown(wait)


def _hand_over(calls: SimpleQueue[Callable[[], None] | None], pool: ThreadPoolExecutor) -> None:
    while (call := calls.get()) is not None:
        pool.submit(call)
        del call  # else the last one, and all it holds, lives until the next comes


def _run(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
