"""Continuous batching: rows join the running ones when there is room and leave when they end.

It decides who runs; `StepRunner` does the work. While the device works on one step, the host
reads the tokens of the step before: a row that ended is noticed one step late, which costs
one row's share of a step and saves the device from waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from softrag.decoder.cache import PAGE, pages_for
from softrag.decoder.row import Row, biases_of
from softrag.decoder.runner import LARGEST_CAPTURED, Chosen, NewRow, StepRunner
from softrag.decoder.turns import Turns


class _Running(NamedTuple):
    """A row in the batch and the pages that are its own."""

    row: Row
    pages: list[int]


class _Step(NamedTuple):
    """A step that was started: which rows its tokens belong to."""

    chosen: Chosen
    rows: list[Row]


class Scheduler:
    """Runs any number of rows on a runner's places.

    Args:
        runner: Does the steps.
        end_ids: Tokens that end an answer.
        memory_ids: Placeholders of soft tokens in prompts.
        batch_tokens: Most prompt tokens read in one step; a longer prompt is read alone.
        lock: Held while work is given to the device.
        ahead: Whether a step is started before the tokens of the one before are read.
    """

    def __init__(
        self,
        runner: StepRunner,
        *,
        end_ids: set[int],
        memory_ids: Sequence[int],
        batch_tokens: int,
        lock: threading.Lock,
        ahead: bool,
    ) -> None:
        self._runner = runner
        self._end_ids = end_ids
        self._memory_ids = frozenset(memory_ids)
        self._batch_tokens = batch_tokens
        self._lock = lock
        self._ahead = ahead
        self._running: list[_Running] = []
        self._in_flight: _Step | None = None
        self._turns = Turns(self._advance)

    def finish(self, rows: Sequence[Row]) -> None:
        """Decode rows until all are done."""
        for row in rows:
            self._check_room(row)
        self._turns.finish(rows)

    def stream(self, row: Row) -> Iterator[str]:
        """Decode one row, in pieces of text."""
        self._check_room(row)
        return self._turns.stream(row)

    def _check_room(self, row: Row) -> None:
        wanted, there = self._pages_of(row), self._runner.pool.size
        if wanted > there:
            raise ValueError(
                f"The prompt and its answer may have {wanted * PAGE} tokens, but the decoder "
                f"keeps keys and values of {there * PAGE}. Ask with fewer or shorter documents, "
                "lower max_new_tokens, or make the decoder with more cache_tokens."
            )

    def _advance(self) -> None:
        """Start the next step and read the tokens of the one before."""
        try:
            started = self._start()
            if self._in_flight is not None:
                self._read(self._in_flight)
            self._in_flight = started
            # What a copy bias favours depends on the last token.
            copying = any(row.copier is not None for row, _ in self._running)
            if started is not None and (copying or not self._ahead):
                self._read(started)
                self._in_flight = None
            self._retire()
        except BaseException as error:
            self._fail(error)
            raise

    def _retire(self) -> None:
        """Let rows leave whose last token is chosen or whose caller is gone."""
        keep = [
            place
            for place, (row, _) in enumerate(self._running)
            if not row.cancelled and not row.done and row.n_started < row.request.max_new_tokens
        ]
        if len(keep) == len(self._running):
            return
        for place in set(range(len(self._running))) - set(keep):
            # A step that still writes there comes before those of the next owner.
            self._runner.pool.give_back(self._running[place].pages)
        self._running = [self._running[place] for place in keep]
        with self._lock:
            self._runner.drop(keep)

    def _start(self) -> _Step | None:
        self._retire()
        joining = self._admit()
        if not self._running and not joining:
            return None
        self._running += joining
        rows = [row for row, _ in self._running]
        with self._lock:
            chosen = self._runner.step(
                [self._prepare(*running) for running in joining], biases_of(rows)
            )
        for row in rows:
            row.n_started += 1
        return _Step(chosen, rows)

    def _admit(self) -> list[_Running]:
        """Take from those that wait, first come first served, what fits this step."""
        joining: list[_Running] = []
        tokens, pool, waiting = 0, self._runner.pool, self._turns.waiting
        # Rows that run wait for a step's prompts too: keep such steps short.
        limit = min(self._batch_tokens, LARGEST_CAPTURED) if self._running else self._batch_tokens
        while waiting and len(self._running) + len(joining) < self._runner.batch_size:
            row = waiting[0]
            if not row.cancelled:
                tokens += len(row.prompt.input_ids)
                if (joining and tokens > limit) or self._pages_of(row) > pool.free:
                    break
                joining.append(_Running(row, pool.take(self._pages_of(row))))
            waiting.popleft()
        return joining

    def _prepare(self, row: Row, pages: list[int]) -> NewRow:
        ids = row.prompt.input_ids
        return NewRow(
            # Placeholders may lie behind the base vocabulary; any word will do in their place.
            input_ids=[0 if i in self._memory_ids else i for i in ids],
            at_memory=[at for at, i in enumerate(ids) if i in self._memory_ids],
            memories=row.memories,
            pages=pages,
            temperature=row.request.temperature,
            seed=row.seed(),
            with_state=row.request.with_state,
        )

    def _read(self, step: _Step) -> None:
        tokens, logprobs, states = step.chosen.wait()
        if states is not None:
            for row, state in zip(step.rows[-len(states) :], states, strict=True):
                row.prompt_state = state if row.request.with_state else None
        for row, token, logprob in zip(step.rows, tokens, logprobs, strict=True):
            # A row that ended a step ago was still in this one.
            if not row.done and not row.cancelled:
                row.push(token, logprob, self._end_ids)
                if row.done or row.has_delta:
                    row.wake()

    def _fail(self, error: BaseException) -> None:
        """Give every row the error and start afresh."""
        for _, pages in self._running:
            self._runner.pool.give_back(pages)
        flying = [] if self._in_flight is None else self._in_flight.rows
        for row in [row for row, _ in self._running] + flying:
            if not row.done:
                row.error = error
                row.wake()
        self._running = []
        self._in_flight = None
        self._runner.drop([])

    def _pages_of(self, row: Row) -> int:
        return pages_for(len(row.prompt.input_ids) + row.request.max_new_tokens)


def default_cache_tokens(
    device: torch.device, *, batch_size: int, max_length: int, bytes_per_token: int
) -> int:
    """Return for how many tokens to keep keys and values.

    2,048 for every row of a full batch, and one of the longest prompts at least; on a GPU at most
    half of the memory that is free.
    """
    wanted = max(2048 * batch_size, max_length)
    if device.type != "cuda":
        # Pages that are never used cost no memory there.
        return min(wanted, max(max_length, 2**32 // bytes_per_token))
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(PAGE, min(wanted, free // 2 // bytes_per_token))
