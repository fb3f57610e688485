"""What the thread pool of the async calls promises."""

from __future__ import annotations

import threading
import weakref

import pytest

from softrag.threads import LoopThreads


@pytest.fixture
def threads():
    threads = LoopThreads(3, "test")
    yield threads
    threads.shutdown()


def test_calls_give_their_results_and_errors(threads):
    assert threads.submit(divmod, 7, 2).result(10) == (3, 1)
    assert list(threads.map(str, range(20))) == [str(n) for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        threads.submit(divmod, 1, 0).result(10)


def test_who_brings_work_starts_no_worker(threads, monkeypatch):
    starters = {}
    start = threading.Thread.start

    def recorded(thread):
        starters[thread.name] = threading.current_thread().name
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", recorded)
    together = threading.Barrier(4)
    waiting = [threads.submit(together.wait, 10) for _ in range(3)]
    together.wait(10)

    assert len({future.result(10) for future in waiting}) == 3
    workers = {name for name in starters if name != "test-starter"}
    assert len(workers) == 3
    assert {starters[name] for name in workers} == {"test-starter"}


def test_no_more_than_the_limit_run_at_the_same_time(threads):
    release = threading.Event()
    running = threading.Semaphore(0)

    def work():
        running.release()
        return release.wait(10)

    waiting = [threads.submit(work) for _ in range(6)]
    for _ in range(3):
        assert running.acquire(timeout=10)
    assert not running.acquire(timeout=0.05)
    release.set()

    assert [future.result(10) for future in waiting] == [True] * 6


def test_a_call_that_was_cancelled_in_time_does_not_run(threads):
    release = threading.Event()
    busy = [threads.submit(release.wait, 10) for _ in range(3)]
    ran = []
    late = threads.submit(ran.append, 1)

    assert late.cancel()
    release.set()
    assert all(future.result(10) for future in busy)
    threads.shutdown()

    assert ran == []


def test_a_finished_call_keeps_nothing_alive(threads):
    class Engine:
        def ask(self):
            return "Paris"

    engine, gone = Engine(), threading.Event()
    weakref.finalize(engine, gone.set)

    assert threads.submit(engine.ask).result(10) == "Paris"
    del engine

    assert gone.wait(10)


def test_shutdown_finishes_what_was_submitted(threads):
    done = [threads.submit(str, number) for number in range(50)]

    threads.shutdown()

    assert [future.result(0) for future in done] == [str(number) for number in range(50)]
    with pytest.raises(RuntimeError, match="shutdown"):
        threads.submit(str, 1)
