"""Limits on a request's body: its size, and the time it may take to arrive."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softrag.serve.errors import ApiError, send_error


class BodyLimits:
    """ASGI middleware that refuses bodies which are too large (413) or too slow (408)."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a declared size, and count what arrives whatever was declared."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared[:20]) > self._max_bytes:
            await send_error(self._too_large(), scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        n_bytes = 0
        complete = False

        async def limited() -> Message:
            nonlocal n_bytes, complete
            if complete:
                return await receive()  # what comes now is only the news that the client has left
            try:
                message = await asyncio.wait_for(receive(), deadline - loop.time())
            except asyncio.TimeoutError:
                raise ApiError(
                    408, f"The request's body did not arrive within {self._timeout_s:.0f} s."
                ) from None
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._max_bytes:
                raise self._too_large()
            complete = not message.get("more_body", False)
            return message

        await self._app(scope, limited, send)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"The request's body is larger than {self._max_bytes} bytes. Send less at a time.",
            code="body_too_large",
        )
