"""Who may ask, and as which tenant. It knows nothing of requests' contents."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from softrag.serve.errors import ApiError, send_error

DEFAULT_TENANT = ""
"""Whoever has a key without a tenant, or needs none."""

MIN_KEY_LENGTH = 16
OPEN_PATHS = frozenset({"/healthz", "/openapi.json"})
METRICS_PATH = "/metrics"

_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_KEY = re.compile(r"[\x21-\x2b\x2d-\x7e]+")  # what a header holds, without blanks and commas


class Keys:
    """API keys and the tenant that each of them opens. It keeps digests, not the keys.

    Args:
        tenants: Tenant by key; `DEFAULT_TENANT` stands for no tenant of its own.
    """

    def __init__(self, tenants: Mapping[str, str]) -> None:
        if not tenants:
            raise ValueError("There are no keys; expected one per line, `KEY` or `TENANT KEY`.")
        for key, tenant in tenants.items():
            # Never the key itself: messages end in logs.
            if len(key) < MIN_KEY_LENGTH or not _KEY.fullmatch(key):
                raise ValueError(
                    f"A key of tenant {tenant!r} is unfit: expected at least {MIN_KEY_LENGTH} "
                    "printable ASCII characters without blanks and commas. Make one with: "
                    "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
                )
            if tenant != DEFAULT_TENANT and not _TENANT.fullmatch(tenant):
                raise ValueError(
                    f"Tenant {tenant!r} is unfit: expected at most 63 of a-z, 0-9, - and _, the "
                    "first a letter or digit, because a folder or collection is named after it."
                )
        self._digests = [(_digest(key.encode()), tenant) for key, tenant in tenants.items()]

    @classmethod
    def parse(cls, text: str) -> Keys:
        """Read keys from text: `KEY` or `TENANT KEY` per line or between commas; `#` comments."""
        tenants: dict[str, str] = {}
        for entry in re.split(r"[\n,]", re.sub(r"#.*", "", text)):
            words = entry.split()
            if not words:
                continue
            if len(words) > 2:
                raise ValueError(
                    f"A line of keys has {len(words)} words; expected `KEY` or `TENANT KEY`."
                )
            tenant = words[0] if len(words) == 2 else DEFAULT_TENANT
            if tenants.setdefault(words[-1], tenant) != tenant:
                raise ValueError(
                    f"One key stands for both {tenants[words[-1]]!r} and {tenant!r}; give every "
                    "tenant its own."
                )
        return cls(tenants)

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Read keys from a file, see `parse`."""
        return cls.parse(path.read_text(encoding="utf-8"))

    @property
    def tenants(self) -> frozenset[str]:
        """All tenants."""
        return frozenset(tenant for _, tenant in self._digests)

    def tenant_of(self, key: bytes) -> str | None:
        """Return whom a key opens, or None; the time it takes tells nothing about the keys."""
        presented = _digest(key)
        found = None
        for digest, tenant in self._digests:
            if hmac.compare_digest(digest, presented):
                found = tenant
        return found


class Authentication:
    """ASGI middleware: lets a request in with a key, and notes its tenant in the request's state.

    It stands before anything of the body is read. Paths are refused unless they are listed as
    open, so that a new or misspelt one is closed.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys | None, metrics_key: str | None) -> None:
        self._app = app
        self._keys = keys
        self._metrics = Keys({metrics_key: DEFAULT_TENANT}) if metrics_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, or hand the request on."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            tenant = self._tenant(scope)
            if tenant is None:
                await send_error(_refusal(scope), scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, receive, send)

    def _tenant(self, scope: Scope) -> str | None:
        keys = self._keys
        if scope["path"] == METRICS_PATH:
            # What all tenants do together is no tenant's business.
            if keys is not None and self._metrics is None:
                return None
            keys = self._metrics
        return DEFAULT_TENANT if keys is None else keys.tenant_of(_bearer(scope) or b"")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _bearer(scope: Scope) -> bytes | None:
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1:
        return None
    scheme, _, key = values[0].partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else None


def _refusal(scope: Scope) -> ApiError:
    if _bearer(scope) is None:
        message = "No API key was given. Send it as a header: `Authorization: Bearer KEY`."
    else:
        message = "The API key is not known to this server, or not for this path."
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
