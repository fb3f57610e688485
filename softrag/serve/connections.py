"""Connections that do not get on: slow headers, and clients that do not read their answer.

uvicorn waits for both as long as they like, and a few hundred such connections keep everybody else
out ("slow loris").
"""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from softrag.serve.errors import ApiError


def protocol_with(timeout_s: float) -> type[H11Protocol]:
    """Return uvicorn's HTTP protocol with a time limit, in seconds, on what a client keeps open.

    It counts while a request's headers arrive, while a refused body goes on arriving, and while an
    answer waits for the client to read. (A body has a limit of its own, in `limits`.)
    """

    class Protocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._reading = _Limit(transport, timeout_s)
            self._writing = _Limit(transport, timeout_s)
            self._reading.start()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._reading.stop()
            else:
                self._reading.start()

        def on_response_complete(self) -> None:
            # Between requests uvicorn's own keep-alive limit counts, from the next byte on ours.
            self._reading.stop()
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._writing.start()

        def resume_writing(self) -> None:
            self._writing.stop()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._reading.stop()
            self._writing.stop()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            """Answer what is no HTTP in the shape of all other errors."""
            body = json.dumps(ApiError(400, msg).body).encode()
            headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

    return Protocol


class _Limit:
    """Cuts a connection when it is not stopped in time."""

    def __init__(self, transport: asyncio.Transport, timeout_s: float) -> None:
        self._transport = transport
        self._timeout_s = timeout_s
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to count, unless it counts already."""
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._timeout_s, self._transport.abort)

    def stop(self) -> None:
        """Stop counting."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
