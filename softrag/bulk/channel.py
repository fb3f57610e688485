"""What the coordinator and its workers say to each other: JSON and arrays, no pickle."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from softrag.answer import AddError
from softrag.bulk.shares import Piece, Share
from softrag.documents import Chunk
from softrag.indexing import Tally
from softrag.memory import Memory
from softrag.store.points import Points, make_points
from softrag.store.record import StoreRecord


class HungUp(ConnectionError):
    """The other end of a channel is gone; no error of files, stores or callbacks is one."""


class Channel:
    """One end of a connection. A message is a JSON object, and some are followed by an array."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send(self, message: dict[str, Any]) -> None:
        """Send a message.

        Raises:
            HungUp: The other end is gone.
        """
        self._send_bytes(json.dumps(message).encode())

    def receive(self) -> dict[str, Any]:
        """Wait for a message.

        Raises:
            HungUp: The other end is gone.
        """
        message: dict[str, Any] = json.loads(self._receive_bytes())
        return message

    def request(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message and return the answer."""
        self.send(message)
        return self.receive()

    def send_points(self, points: Points) -> None:
        """Send points; the message `{"do": "write"}` comes first."""
        self.send({"ids": list(points.ids), "payloads": list(points.payloads)})
        self._send_bytes(np.ascontiguousarray(points.vectors, np.float32).tobytes())

    def receive_points(self, dimension: int) -> Points:
        """Wait for points with vectors of `dimension`."""
        message = self.receive()
        vectors = np.frombuffer(self._receive_bytes(), np.float32)
        return Points(
            ids=message["ids"],
            payloads=message["payloads"],
            vectors=vectors.reshape(-1, dimension),
        )

    def close(self) -> None:
        """Hang up."""
        self._connection.close()

    def _send_bytes(self, data: bytes) -> None:
        try:
            self._connection.send_bytes(data)
        except OSError as error:
            raise HungUp(str(error)) from error

    def _receive_bytes(self) -> bytes:
        try:
            return self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise HungUp(str(error)) from error


class RemoteStore:
    """The coordinator's store, for a worker that cannot open it: a `ChunkSink`."""

    def __init__(self, channel: Channel, record: StoreRecord, place: str) -> None:
        self._channel = channel
        self._record = record
        self._place = place

    def missing(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Return those of `chunks` that are not stored as they are."""
        known = [{"id": c.id, "title": c.title, "metadata": dict(c.metadata)} for c in chunks]
        ids = set(self._channel.request({"do": "missing", "chunks": known})["ids"])
        return [chunk for chunk in chunks if chunk.id in ids]

    def upsert(
        self, chunks: Sequence[Chunk], embeddings: np.ndarray, memories: Sequence[Memory | None]
    ) -> None:
        """Store chunks; memories are encoded here, so that the one writer has less to do."""
        points = make_points(self._record, chunks, embeddings, memories, place=self._place)
        self._channel.send({"do": "write"})
        self._channel.send_points(points)
        self._channel.receive()


def share_message(share: Share) -> dict[str, Any]:
    """Return a share as JSON values."""
    return asdict(share)


def read_share_message(message: dict[str, Any]) -> Share:
    """Return the share in a message."""
    pieces = [Piece(**piece) for piece in message["pieces"]]
    return Share(number=message["number"], pieces=pieces, nbytes=message["nbytes"])


def tally_message(tally: Tally) -> dict[str, Any]:
    """Return a tally as JSON values."""
    return {
        "documents": tally.documents,
        "added": tally.added,
        "unchanged": tally.unchanged,
        "errors": [asdict(error) for error in tally.errors],
        "failed": sorted(tally.failed),
        "ids": {source: sorted(ids) for source, ids in tally.ids.items()},
    }


def read_tally_message(message: dict[str, Any]) -> Tally:
    """Return the tally in a message."""
    return Tally(
        documents=message["documents"],
        added=message["added"],
        unchanged=message["unchanged"],
        errors=[AddError(**error) for error in message["errors"]],
        failed=set(message["failed"]),
        ids=defaultdict(set, {source: set(ids) for source, ids in message["ids"].items()}),
    )
