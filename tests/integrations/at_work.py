"""In which threads the model works, and on how many questions at a time."""

from __future__ import annotations

import threading
import time

import pytest

from softrag import TorchDecoder


def threads_of(monkeypatch: pytest.MonkeyPatch, *methods: tuple[object, str]) -> set[int]:
    """Return a set to which every call of the methods, as `(object, name)`, adds its thread."""
    threads: set[int] = set()

    def watched(call):
        def watching(*args, **kwargs):
            threads.add(threading.get_ident())
            return call(*args, **kwargs)

        return watching

    for owner, name in methods:
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    return threads


class Rows(list[int]):
    """How many requests took part in every step of a decoder.

    Attributes:
        crowd: The next step takes until so many requests are there, at most ten seconds.
    """

    crowd = 1


def rows_of(monkeypatch: pytest.MonkeyPatch, decoder: TorchDecoder) -> Rows:
    """Return a list to which every step of the decoder adds how many requests took part in it."""
    sizes = Rows()
    runner, waiting = decoder._engine._runner, decoder._engine._turns.waiting
    step = runner.step

    def counting(new, *biases):
        rows = runner.rows + len(new)
        sizes.append(rows)
        deadline = time.monotonic() + 10
        while rows + len(waiting) < sizes.crowd and time.monotonic() < deadline:
            time.sleep(0.001)
        sizes.crowd = 1
        return step(new, *biases)

    monkeypatch.setattr(runner, "step", counting)
    return sizes
