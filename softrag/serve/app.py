"""The routes put together: an ASGI application, for any server that runs one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response

from softrag.engine import SoftRAG
from softrag.errors import SoftRAGError
from softrag.serve import chat, documents
from softrag.serve.auth import DEFAULT_TENANT, METRICS_PATH, Authentication
from softrag.serve.errors import handle
from softrag.serve.limits import BodyLimits
from softrag.serve.metrics import RequestCounter
from softrag.serve.schemas import ErrorReply, Health
from softrag.serve.service import Service, service_of
from softrag.serve.settings import ServeSettings

_ERRORS: dict[int | str, str] = {
    400: "Not a request that can be answered; the message says why",
    401: "No key, or an unknown one",
    404: "No such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    429: "Too many requests wait; ask again after `Retry-After` seconds",
    500: "A mistake of the server",
    503: "The store or the decoder does not answer, or no place came free",
    504: "It took longer than a request may",
    "default": "Another error",
}


def create_app(engines: Mapping[str, SoftRAG], settings: ServeSettings) -> FastAPI:
    """Return the server's application, which closes the engines when it ends.

    Args:
        engines: An engine for every tenant of `settings.keys`, or for `DEFAULT_TENANT` alone
            without keys; see `open_tenants`.
        settings: Limits and keys; where to listen is for whoever runs the application.
    """
    wanted = settings.keys.tenants if settings.keys else {DEFAULT_TENANT}
    if missing := wanted - engines.keys():
        raise ValueError(f"There is no engine for the tenants {sorted(missing)}.")
    service = Service(engines, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(
        title="softrag",
        version="1",  # of the routes
        description="Answers questions from memories of documents.",
        lifespan=lifespan,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={
            status: {"model": ErrorReply, "description": text} for status, text in _ERRORS.items()
        },
    )
    app.state.service = service
    # For the description only: the middleware has seen the key before anything else is read.
    bearer = [Depends(HTTPBearer(auto_error=False))] if settings.keys else []
    app.include_router(chat.router, dependencies=bearer)
    app.include_router(documents.router, dependencies=bearer)

    @app.get("/healthz", tags=["Operation"])
    async def health() -> Health:
        """Say that the server runs."""
        return Health(model=settings.model)

    @app.get(METRICS_PATH, tags=["Operation"], include_in_schema=False)
    async def metrics(request: Request) -> Response:
        """Return what Prometheus reads."""
        return Response(service_of(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)

    for kind in (HTTPException, RequestValidationError, SoftRAGError, ValueError, Exception):
        app.add_exception_handler(kind, handle)
    # The last one added sees a request first.
    app.add_middleware(
        BodyLimits, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s
    )
    app.add_middleware(Authentication, keys=settings.keys, metrics_key=settings.metrics_key)
    app.add_middleware(RequestCounter, metrics=service.metrics)
    return app
