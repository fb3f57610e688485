"""Requests of every shape that a decoder answers, and what becomes of a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from softrag.decoder import DecodeRequest, DecodeResult
from softrag.memory import Memory
from tests.families import SENTENCES


def asks(memories: Sequence[Memory]) -> list[DecodeRequest]:
    """Ask about several memories, one, none, and a memory beside a text."""
    return [
        DecodeRequest(question="Who wrote Hamlet?", documents=memories[:3], max_new_tokens=40),
        DecodeRequest(question="Where is Paris?", documents=memories[1:2], max_new_tokens=1),
        DecodeRequest(question="Why?", max_new_tokens=9),
        DecodeRequest(
            question="What is the largest river?",
            documents=[memories[5], SENTENCES[4]],
            max_new_tokens=17,
        ),
    ]


def drain(stream: Iterator[str]) -> tuple[list[str], DecodeResult]:
    """Return the pieces and the result of a stream."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value
