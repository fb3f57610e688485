"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from softrag.errors import DecoderError, EmptyStoreError, SoftRAGError, StoreError

logger = logging.getLogger(__name__)

RETRY_S = 5
"""After how many seconds to ask again when a part behind the server is down."""

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(HTTPException):
    """What a client is told.

    Args:
        status: HTTP status.
        message: What was found, what was expected, the fix.
        param: The part of the request that is wrong.
        code: For programs.
        headers: Of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, detail=message, headers=headers)
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The response's body."""
        fallback = "invalid_request_error" if self.status_code < 500 else "server_error"
        return {
            "error": {
                # A message may quote what no JSON can hold.
                "message": self.detail.encode("utf-8", "replace").decode(),
                "type": _TYPES.get(self.status_code, fallback),
                "param": self.param and self.param.encode("utf-8", "replace").decode(),
                "code": self.code,
            }
        }

    @property
    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.body, self.status_code, headers=self.headers)


def api_error(error: Exception) -> ApiError:
    """Return what a client is told of an error; what is our own business goes to the log only."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, EmptyStoreError):
        message = "There are no documents yet. Add some first: POST /v1/documents."
        return ApiError(400, message, code="no_documents")
    # Wrong arguments, which the engine explains; its own kinds of ValueError are about documents.
    if isinstance(error, ValueError):
        return ApiError(400, str(error))
    logger.error("A request failed", exc_info=error)
    if isinstance(error, StoreError):
        return _unavailable("store")
    if isinstance(error, DecoderError):
        return _unavailable("decoder")
    if isinstance(error, SoftRAGError):
        return ApiError(500, "The documents cannot be read; the server's log says why.")
    return ApiError(500, "Something went wrong; the server's log says what.")


def _unavailable(part: str) -> ApiError:
    return ApiError(
        503,
        f"The {part} behind this server does not answer. Ask again in {RETRY_S} s.",
        code="unavailable",
        headers={"Retry-After": str(RETRY_S)},
    )


async def handle(request: Request, error: Exception) -> JSONResponse:
    """Answer a request that failed."""
    return api_error(error).response


async def send_error(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request from a middleware."""
    await error.response(scope, receive, send)


def _invalid(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is no JSON: {first['ctx']['error']}.", code="invalid_json")
    if first["type"] == "model_attributes_type" and len(first["loc"]) == 1:
        return ApiError(
            400, "The body must be a JSON object, sent with Content-Type: application/json."
        )
    where = ".".join(str(step) for step in first["loc"][1:]) or "body"
    found = first.get("input")
    # Of a whole object its name says enough.
    quoted = f", found {found!r:.80}" if isinstance(found, str | int | float) else ""
    return ApiError(400, f"{where}: {first['msg']}{quoted}.", param=where)
