"""The coordinator: hands out shares, keeps count, and writes where only one process may.

A share is done when its worker says so, after all of its chunks were acknowledged by the store. The
share of a worker that dies goes to another. Chunks are stored under their content address, so one
that is stored twice is stored once.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from time import perf_counter
from typing import Any, NamedTuple

from softrag import errors
from softrag.answer import AddError
from softrag.bulk.channel import Channel, HungUp, read_tally_message, share_message
from softrag.bulk.shares import Share
from softrag.bulk.worker import Address
from softrag.documents import Chunk
from softrag.indexing import Tally
from softrag.store import MemoryStore

logger = logging.getLogger(__name__)

# How many workers a share may kill before it is left out.
ATTEMPTS = 3


class Progress(NamedTuple):
    """How far all workers are together.

    Attributes:
        nbytes: Read and stored so far.
        documents: Read so far.
        chunks: Stored or found stored so far.
        workers: At work.
        seconds: Since the first worker was ready.
    """

    nbytes: int
    documents: int
    chunks: int
    workers: int
    seconds: float


class Coordinator:
    """Serves workers until every share is done.

    Args:
        shares: What is to be done; cut as workers ask.
        store: The store that workers cannot open, because only one process may; None where they
            can.
        on_progress: Called after every share, from any thread; what it raises ends the run.
        host: Where workers on other machines reach this one; None serves this machine only.
    """

    def __init__(
        self,
        shares: Iterator[Share],
        *,
        store: MemoryStore | None,
        on_progress: Callable[[Progress], None] | None = None,
        host: str | None = None,
    ) -> None:
        self.tally = Tally()
        self._shares = shares
        self._store = store
        self._on_progress = on_progress
        self._given_back: deque[Share] = deque()
        self._deaths: Counter[int] = Counter()
        self._changed = threading.Condition()
        self._open_shares = 0
        self._nbytes = 0
        self._workers = 0
        self._gone = 0
        self._started: float | None = None
        self._all_cut = False
        self._error: BaseException | None = None
        key = os.urandom(32)
        self._listener = Listener((host, 0) if host else None, backlog=128, authkey=key)
        self.address = Address(self._listener.address, key)
        threading.Thread(target=self._accept, name="softrag-coordinator", daemon=True).start()

    @property
    def seconds(self) -> float:
        """How long the workers have been at work; loading their models does not count."""
        return 0.0 if self._started is None else perf_counter() - self._started

    @property
    def is_done(self) -> bool:
        """Whether every share is done, or an error ended it all."""
        with self._changed:
            return self._is_done()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until `is_done`, at most `timeout` seconds.

        Raises:
            SoftRAGError: A worker or the store failed; what is stored stays stored.
            BaseException: What `on_progress` raised.
        """
        with self._changed:
            self._changed.wait_for(self._is_done, timeout)
            if self._error is not None:
                raise self._error

    def see_off(self, workers: int) -> None:
        """Wait until `workers` have come and gone; the late ones are told that all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._gone >= workers)

    def close(self) -> None:
        """Stop listening; workers that ask for more are told that there is none."""
        with self._changed:
            self._all_cut = True
            self._given_back.clear()
            self._changed.notify_all()
        self._listener.close()

    # Within

    def _is_done(self) -> bool:
        nothing_left = self._all_cut and not self._given_back and not self._open_shares
        return self._error is not None or nothing_left

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except (AuthenticationError, EOFError, ConnectionError):
                continue  # a stranger, or a worker that died at the door
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        """Answer one worker until it is gone."""
        channel = Channel(connection)
        share: Share | None = None
        with self._changed:
            self._workers += 1
        try:
            while True:
                message = channel.receive()
                if message["do"] == "next":
                    share = self._take()
                    channel.send({"share": share_message(share) if share else None})
                elif message["do"] == "done":
                    assert share is not None
                    self._finish(share, read_tally_message(message["tally"]))
                    share = None
                elif message["do"] == "fail":
                    kind = getattr(errors, message["kind"], errors.SoftRAGError)
                    raise kind(message["message"])
                else:
                    channel.send(self._answer(message, channel))
        except HungUp:
            pass  # the worker died, or has no more to do
        except BaseException as error:  # a callback's sys.exit() must not end this thread alone
            with self._changed:
                self._error = self._error or error
        finally:
            channel.close()
            self._lose(share)

    def _answer(self, message: dict[str, Any], channel: Channel) -> dict[str, Any]:
        if message["do"] == "hello":
            logger.info("a worker is here and loads its model")
            return {"record": asdict(self._store.record) if self._store else None}
        assert self._store is not None
        if message["do"] == "missing":
            chunks = [Chunk(**known, text="", n_tokens=0) for known in message["chunks"]]
            return {"ids": [chunk.id for chunk in self._store.missing(chunks)]}
        self._store.write(channel.receive_points(self._store.record.dimension))
        return {}

    def _take(self) -> Share | None:
        """Return a share, as soon as there is one; None when all are done."""
        with self._changed:
            if self._started is None:
                self._started = perf_counter()
                logger.info("the first worker is ready")
            while not self._is_done():
                share = self._next_share()
                if share is not None:
                    self._open_shares += 1
                    return share
                # The shares of others may come back.
                self._changed.wait_for(lambda: self._given_back or self._is_done())
            return None

    def _next_share(self) -> Share | None:
        if self._given_back:
            return self._given_back.popleft()
        share = None if self._all_cut else next(self._shares, None)
        if share is None and not self._all_cut:
            self._all_cut = True
            self._changed.notify_all()
        return share

    def _finish(self, share: Share, tally: Tally) -> None:
        with self._changed:
            self.tally.merge(tally)
            self._nbytes += share.nbytes
            progress = Progress(
                nbytes=self._nbytes,
                documents=self.tally.documents,
                chunks=self.tally.added + self.tally.unchanged,
                workers=self._workers,
                seconds=self.seconds,
            )
        if self._on_progress is not None:
            self._on_progress(progress)
        # Not before the callback: what it raises about the last share ends the run, too.
        with self._changed:
            self._open_shares -= 1
            self._changed.notify_all()

    def _lose(self, share: Share | None) -> None:
        """Note that a worker is gone, and give what it had to another."""
        with self._changed:
            self._workers -= 1
            self._gone += 1
            if share is not None:
                self._open_shares -= 1
                self._deaths[share.number] += 1
                if self._deaths[share.number] < ATTEMPTS:
                    self._given_back.append(share)
                else:
                    self._leave_out(share)
            self._changed.notify_all()

    def _leave_out(self, share: Share) -> None:
        for path in sorted({piece.path for piece in share.pieces}):
            self.tally.failed.add(path)
            self.tally.errors.append(
                AddError(
                    source=path,
                    message=f"{path} was left out: {ATTEMPTS} workers died while they read and "
                    f"compressed it and {len(share.pieces) - 1} others. Index it by itself to see "
                    "why; a smaller batch size needs less memory.",
                )
            )
