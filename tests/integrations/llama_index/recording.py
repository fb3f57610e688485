"""What tests look through: a decoder that counts, an event handler, and a walk over objects."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from pydantic import BaseModel, PrivateAttr

from softrag import DecodeRequest, DecodeResult, Memory, TorchDecoder

LONGEST_BLOB = 200


class RecordingDecoder:
    """A real decoder that writes down the size of every batch and every request."""

    def __init__(self, decoder: TorchDecoder) -> None:
        self.decoder = decoder
        self.model = decoder.model
        self.batches: list[int] = []
        self.requests: list[DecodeRequest] = []

    @property
    def fingerprint(self) -> str:
        return self.decoder.fingerprint

    @property
    def joins_requests(self) -> bool:
        return self.decoder.joins_requests

    @property
    def copy_bias(self) -> float:
        return self.decoder.copy_bias

    def prompt_tokens(self, question: str, documents: Sequence[Memory | str]) -> int:
        return self.decoder.prompt_tokens(question, documents)

    def generate(self, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        self.batches.append(len(requests))
        self.requests += requests
        return self.decoder.generate(requests)

    def stream(self, request: DecodeRequest) -> Generator[str, None, DecodeResult]:
        self.batches.append(1)
        self.requests.append(request)
        return (yield from self.decoder.stream(request))

    def close(self) -> None:
        self.decoder.close()


class Events(BaseEventHandler):
    """Keeps every event of LlamaIndex's instrumentation."""

    _events: list[Any] = PrivateAttr(default_factory=list)

    @property
    def events(self) -> list[Any]:
        return self._events

    def handle(self, event: Any, **kwargs: Any) -> None:
        self._events.append(event)


class Arguments(SimpleSpanHandler):
    """Keeps the arguments and results of every span, as tracing exporters do."""

    _seen: list[Any] = PrivateAttr(default_factory=list)

    @property
    def seen(self) -> list[Any]:
        return self._seen

    def new_span(self, id_, bound_args, instance=None, parent_span_id=None, tags=None, **kwargs):
        self._seen.append(dict(bound_args.arguments))
        return super().new_span(id_, bound_args, instance, parent_span_id, tags, **kwargs)

    def prepare_to_exit_span(self, id_, bound_args, instance=None, result=None, **kwargs):
        self._seen.append(result)
        return super().prepare_to_exit_span(id_, bound_args, instance, result, **kwargs)


class Payloads(BaseCallbackHandler):
    """Keeps every payload of LlamaIndex's callbacks."""

    def __init__(self) -> None:
        super().__init__(event_starts_to_ignore=[], event_ends_to_ignore=[])
        self.payloads: list[Any] = []

    def on_event_start(self, event_type, payload=None, event_id="", parent_id="", **kwargs):
        self.payloads.append((event_type, payload))
        return event_id

    def on_event_end(self, event_type, payload=None, event_id="", **kwargs):
        self.payloads.append((event_type, payload))

    def start_trace(self, trace_id=None):
        pass

    def end_trace(self, trace_id=None, trace_map=None):
        pass


def blobs(root: Any) -> list[str]:
    """Return what under `root` is a tensor, bytes, numbers or a run of over 200 characters.

    Search embeddings are LlamaIndex's own and left out.
    """
    return [found for found, _ in _walk(root, "root", set())]


def strings(root: Any) -> list[str]:
    """Return every string under `root`, to see that the walk gets there."""
    seen: list[str] = []
    for _ in _walk(root, "root", set(), seen):
        pass
    return seen


def _walk(
    value: Any, path: str, visited: set[int], seen: list[str] | None = None
) -> Iterator[tuple[str, Any]]:
    if isinstance(value, str):
        if seen is not None:
            seen.append(value)
        longest = max(map(len, value.split()), default=0)
        if longest > LONGEST_BLOB or ("tensor(" in value and "[" in value):
            yield f"{path}: {longest} characters without a space", value
        return
    if isinstance(value, (bytes, bytearray, torch.Tensor, np.ndarray, Memory)):
        yield f"{path}: {type(value).__name__}", value
        return
    if id(value) in visited:
        return
    visited.add(id(value))
    if isinstance(value, BaseModel):
        fields = {n: getattr(value, n) for n in type(value).model_fields if n != "embedding"}
        yield from _walk({**fields, **(value.model_extra or {})}, path, visited, seen)
        # As exporters see it, too; engines and indexes cannot be dumped.
        yield from _walk(value.__pydantic_private__ or {}, f"{path}.private", visited, seen)
    elif isinstance(value, Mapping):
        for name, each in value.items():
            if name not in ("_engine", "embedding"):
                yield from _walk(each, f"{path}.{name}", visited, seen)
    elif isinstance(value, (list, tuple, set)):
        for place, each in enumerate(value):
            yield from _walk(each, f"{path}[{place}]", visited, seen)
    elif hasattr(value, "__dict__") and type(value).__module__.startswith("llama_index"):
        fields = {n: v for n, v in vars(value).items() if not n.startswith("_engine")}
        yield from _walk(fields, path, visited, seen)
