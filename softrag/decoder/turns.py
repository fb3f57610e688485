"""Callers that share one engine without a thread of its own: whoever waits takes a turn at it.

A caller that waits for its rows drives the engine for everybody; when its own are done it hands
the turn to another that waits. So nothing runs when nobody waits, and a stream whose reader went
away stops by itself.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from softrag.decoder.row import Row


class Turns:
    """Rows that wait for an engine, and the callers that drive it.

    Args:
        advance: Does one step of the engine: takes rows from `waiting`, pushes tokens. Never
            called by two threads at once. An error that it raises reaches the rows it took.
    """

    def __init__(self, advance: Callable[[], None]) -> None:
        self.waiting: deque[Row] = deque()
        self._advance = advance
        self._turn = threading.Lock()
        self._idle: dict[threading.Event, None] = {}  # of callers that wait, oldest first
        self._mutex = threading.Lock()

    def finish(self, rows: Sequence[Row]) -> None:
        """Decode rows until all are done.

        Raises:
            BaseException: What broke a row.
        """
        awake = threading.Event()
        try:
            self._submit(rows, awake)
            self._drive(awake, lambda: all(row.done for row in rows))
        finally:
            for row in rows:
                row.cancelled = True
        for row in rows:
            if row.error is not None:
                raise row.error

    def stream(self, row: Row) -> Iterator[str]:
        """Decode one row, in pieces of text as they become certain.

        Raises:
            BaseException: What broke the row.
        """
        awake = threading.Event()
        try:
            self._submit([row], awake)
            while not row.done or row.has_delta:
                self._drive(awake, lambda: row.done or row.has_delta)
                delta = row.take_delta()
                if delta:
                    yield delta
        finally:
            row.cancelled = True
        if row.error is not None:
            raise row.error

    def _submit(self, rows: Sequence[Row], awake: threading.Event) -> None:
        for row in rows:
            row.wake = awake.set
        self.waiting.extend(rows)

    def _drive(self, awake: threading.Event, ready: Callable[[], bool]) -> None:
        try:
            while not ready():
                # In the list of the idle before the try to drive: who hands the turn on after the
                # try failed sees it there.
                with self._mutex:
                    self._idle[awake] = None
                if self._turn.acquire(blocking=False):
                    try:
                        with self._mutex:
                            self._idle.pop(awake, None)
                        while not ready():
                            self._advance()
                    finally:
                        self._turn.release()
                else:
                    awake.wait()
                awake.clear()
        finally:
            # Also after an error: rows that wait for their first step did not get it.
            with self._mutex:
                self._idle.pop(awake, None)
            self._hand_on()

    def _hand_on(self) -> None:
        """Wake one caller that waits, unless somebody drives."""
        if self._turn.locked():
            return
        with self._mutex:
            other = next(iter(self._idle), None)
        if other is not None:
            other.set()
