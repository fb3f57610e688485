"""What a server may be told. It knows nothing of HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from softrag.serve.auth import Keys

# The engine answers with 64 threads. An answer that is given up needs two until it has stopped.
MAX_RUNNING = 48


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How a server listens, whom it lets in, and its limits.

    Attributes:
        model: Name of the model in requests and in `/v1/models`.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        keys: Who may ask; None lets everybody in, on this machine only.
        metrics_key: Opens `/metrics`; None opens it only where there are no `keys`.
        max_running: Answers written at the same time.
        max_waiting: Requests that may wait for a running one to end; more are refused (429).
        timeout_s: For a whole request, waiting included.
        body_timeout_s: For a request's body to arrive.
        header_timeout_s: For a request's headers to arrive, and for a client that does not read.
        max_body_bytes: Of a request.
        max_tokens: Most tokens a request may ask for.
    """

    model: str = "softrag"
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Keys | None = None
    metrics_key: str | None = None
    max_running: int = 32
    max_waiting: int = 128
    timeout_s: float = 120.0
    body_timeout_s: float = 20.0
    header_timeout_s: float = 10.0
    max_body_bytes: int = 4 * 2**20
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        """Check the limits, and that no server without keys can be reached from elsewhere."""
        if not 1 <= self.max_running <= MAX_RUNNING:
            raise ValueError(
                f"max_running must be 1 to {MAX_RUNNING}, found {self.max_running}. Start several "
                "servers on one Qdrant server to run more."
            )
        if self.max_waiting < 0:
            raise ValueError(f"max_waiting must be 0 or more, found {self.max_waiting}.")
        for name in (
            "timeout_s",
            "body_timeout_s",
            "header_timeout_s",
            "max_body_bytes",
            "max_tokens",
        ):
            if not 0 < getattr(self, name) < inf:
                raise ValueError(
                    f"{name} must be more than 0 and finite, found {getattr(self, name)}."
                )
        if self.keys is None and self.host not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError(
                f"Without keys a server may only listen on this machine, found host {self.host!r}. "
                "Give it keys (--keys FILE, or SOFTRAG_API_KEYS), or host 127.0.0.1."
            )
