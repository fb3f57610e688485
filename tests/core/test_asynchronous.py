"""What an async stream promises when its reader gives up."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from softrag.answer import AnswerStream
from softrag.asynchronous import AsyncAnswerStream


class SlowModel:
    """A stream whose first piece takes until `release` is set."""

    def __init__(self):
        self.started = threading.Event()
        self.release = threading.Event()
        self.stopped = False

    def start(self):
        return AnswerStream(self._pieces(), sources=[])

    def _pieces(self):
        try:
            self.started.set()
            assert self.release.wait(10)
            yield "one"
            yield "two"
        finally:
            self.stopped = True


@pytest.fixture
def threads():
    with ThreadPoolExecutor(4) as threads:
        yield threads


async def test_a_cancelled_wait_still_stops_the_model(threads):
    model = SlowModel()
    stream = AsyncAnswerStream(model.start, threads)
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.to_thread(model.started.wait, 10)
    waiting.cancel()
    closing = asyncio.ensure_future(stream.aclose())
    await asyncio.sleep(0)

    assert not model.stopped
    model.release.set()
    await closing

    assert model.stopped
    assert [piece async for piece in stream] == []


async def test_a_stream_that_is_closed_before_it_began_never_begins(threads):
    model = SlowModel()
    stream = AsyncAnswerStream(model.start, threads)

    await stream.aclose()

    assert [piece async for piece in stream] == []
    assert not model.started.is_set()
