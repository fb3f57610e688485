"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softrag.answer import Answer, reads_memories

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "softrag_requests_total",
            "Requests answered",
            ["path", "status"],
            registry=self._registry,
        )
        self.failed_streams = Counter(
            "softrag_failed_streams_total",
            "Streams that ended in an error after their start",
            registry=self._registry,
        )
        self.first_token_s = Histogram(
            "softrag_time_to_first_token_seconds",
            "From a chat request's arrival to its first token, waiting included",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.answer_s = Histogram(
            "softrag_answer_seconds",
            "From a chat request's arrival to the end of its answer",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter(
            "softrag_tokens_total",
            "Tokens of complete answers: of prompts, the soft ones among them, and written",
            ["kind"],
            registry=self._registry,
        )
        self._saved = Counter(
            "softrag_tokens_saved_total",
            "Prompt tokens that the same chunks would have cost more as text",
            registry=self._registry,
        )
        self._memories = Counter(
            "softrag_memories_total",
            "Memories read by complete answers: from the store (a hit), or made when asked",
            ["origin"],
            registry=self._registry,
        )
        # Present from the start, so that rates can be computed.
        for kind in ("prompt", "soft", "completion"):
            self._tokens.labels(kind)
        for origin in ("store", "made"):
            self._memories.labels(origin)

    def watch(self, name: str, description: str, value: Callable[[], float]) -> None:
        """Show a value that is read whenever somebody looks."""
        Gauge(name, description, registry=self._registry).set_function(value)

    def count(self, answer: Answer) -> None:
        """Count a complete answer."""
        usage = answer.usage
        self._tokens.labels("prompt").inc(usage.prompt_tokens)
        self._tokens.labels("soft").inc(usage.soft_tokens)
        self._tokens.labels("completion").inc(usage.completion_tokens)
        if usage.text_prompt_tokens is not None:
            # Chunks of a few words can cost more as memories.
            self._saved.inc(max(0, usage.text_prompt_tokens - usage.prompt_tokens))
        if reads_memories(answer.mode):
            read = answer.sources[answer.mode == "mixed" :]
            stored = sum(hit.memory is not None for hit in read)
            self._memories.labels("store").inc(stored)
            self._memories.labels("made").inc(len(read) - stored)

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)


class RequestCounter:
    """ASGI middleware that counts requests by route and status."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count when the response begins."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Only paths that exist: anybody can make up others.
                path = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
