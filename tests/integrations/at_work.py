"""In which threads the model works, and on how many questions at a time."""

from __future__ import annotations

import threading

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


def rows_of(monkeypatch: pytest.MonkeyPatch, decoder: TorchDecoder) -> list[int]:
    """Return a list to which every step of the decoder adds how many requests took part in it."""
    sizes: list[int] = []
    runner = decoder._engine._runner
    step = runner.step

    def counting(new):
        sizes.append(runner.rows + len(new))
        return step(new)

    monkeypatch.setattr(runner, "step", counting)
    return sizes
