"""A vLLM server on the loopback, for what the default tests lack: its protocol around a tiny model.

It reads requests as vLLM 0.32 does (the same checks, the same words when it refuses), decodes
greedily, and keeps what came in. `tests/vllm` runs the same client against the real one.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgpack
import torch
from transformers import DynamicCache

from softrag.model import SoftRAGModel


class VLLMStub:
    """Serves until `close`; `url` is where, `requests` what came in, `embeds` its tensors.

    Attributes:
        written: Token ids of the last answer.
        failures: Statuses to answer the next requests with, instead of an answer.
        breaks_after: Tokens after which a connection is cut; None: never.
        prompt_embeds: Whether `--enable-prompt-embeds` was given.
        models: Names served.
        text: Beside the tokens of an answer; the client reads tokens.
        key: What the client must show; None: nothing.
        gate: Answers wait until it is set.
        memories: What was sent to be kept, by hash.
        connections: How many clients have opened.
    """

    def __init__(self, model: SoftRAGModel, *, port: int = 0) -> None:
        self.model = model
        self.requests: list[dict[str, Any]] = []
        self.memories: dict[str, torch.Tensor] = {}
        self.embeds: list[torch.Tensor] = []
        self.payloads: list[bytes] = []
        self.written: list[int] = []
        self.failures: list[int] = []
        self.breaks_after: int | None = None
        self.prompt_embeds = True
        self.models = ["exported"]
        self.text = ""
        self.key: str | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.running = self.most_running = self.connections = 0
        self.aborted = threading.Event()
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                stub._models(self)

            def do_POST(self) -> None:
                stub._complete(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            # The default of 5 makes clients that come together wait for a second.
            request_queue_size = 128

            def process_request(self, request: Any, client_address: Any) -> None:
                stub.connections += 1
                stub._open.append(request)
                super().process_request(request, client_address)

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that left

        self._server = Server(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self.gate.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        # As a process that ends does; answering threads would go on serving the clients they have.
        for each in self._open:
            with suppress(OSError):  # closed already
                each.shutdown(socket.SHUT_RDWR)

    def _models(self, handler: BaseHTTPRequestHandler) -> None:
        if not self._refused(handler):
            limit = self.model.decoder.config.max_position_embeddings
            models = [{"id": name, "max_model_len": limit} for name in self.models]
            _answer(handler, 200, {"object": "list", "data": models})

    def _complete(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if self._refused(handler):
            return
        self.requests.append(request)
        try:
            if request["model"] not in self.models:
                _refuse(handler, 404, f"The model `{request['model']}` does not exist.")
                return
            sampling = request.get("sampling_params", request)
            try:
                embeds = (
                    self._read(request["prompt_embeds"])
                    if "prompt_embeds" in request
                    else self._assemble(request)
                )
            except ValueError as error:
                _refuse(handler, 400, str(error))
                return
            with self._counted():
                self.gate.wait(30)
                handler.send_response(200)
                handler.send_header("Content-Type", "text/event-stream")
                handler.send_header("Transfer-Encoding", "chunked")
                handler.end_headers()
                for n_tokens, event in self._events(sampling, embeds):
                    if self.breaks_after is not None and n_tokens > self.breaks_after:
                        handler.close_connection = True
                        return
                    if handler.path != "/v1/completions":
                        _as_generated(event)
                    # As vLLM does: only what JSON forbids is escaped.
                    _chunk(handler, f"data: {json.dumps(event, ensure_ascii=False)}\n\n")
            _chunk(handler, "data: [DONE]\n\n")
            _chunk(handler, "")
        except (BrokenPipeError, ConnectionResetError):
            self.aborted.set()
            handler.close_connection = True

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self.running += 1
            self.most_running = max(self.running, self.most_running)
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1

    def _refused(self, handler: BaseHTTPRequestHandler) -> bool:
        if self.key is not None and handler.headers["Authorization"] != f"Bearer {self.key}":
            _answer(handler, 401, {"error": "Unauthorized"})
            return True
        with self._lock:
            status = self.failures.pop(0) if self.failures else None
        if status is not None:
            _refuse(handler, status, "refused by the test")
        return status is not None

    def _read(self, data: str) -> torch.Tensor:
        """Read prompt embeddings as vLLM does, `(tokens, hidden)`."""
        if not self.prompt_embeds:
            raise ValueError("You must set `--enable-prompt-embeds` to input `prompt_embeds`.")
        payload = base64.b64decode(data, validate=True)
        embeds = torch.load(io.BytesIO(payload), weights_only=True)
        assert torch.isfinite(embeds).all()
        with self._lock:
            self.embeds.append(embeds)
            self.payloads.append(payload)
        width = self.model.decoder.config.hidden_size
        if embeds.shape[1] != width:
            raise ValueError(
                f"`prompt_embeds` hidden_size {embeds.shape[1]} does not match the model's "
                f"hidden_size {width}."
            )
        return embeds.float()

    def _assemble(self, request: dict[str, Any]) -> torch.Tensor | None:
        """Embed token ids and put memories at their places; None when one is not known."""
        embeds = self.model.decoder.get_input_embeddings()(torch.tensor(request["token_ids"]))
        embeds = embeds.detach().clone()
        features = request.get("features") or {"mm_hashes": {"image": []}}
        for place, each in enumerate(features["mm_hashes"]["image"]):
            data = features["kwargs_data"]["image"][place]
            if data is not None:
                self.memories[each] = _read_item(base64.b64decode(data, validate=True))
            if each not in self.memories:
                return None
            span = features["mm_placeholders"]["image"][place]
            assert span["length"] == len(self.memories[each])
            embeds[span["offset"] : span["offset"] + span["length"]] = self.memories[each].float()
        return embeds

    def _events(
        self, request: dict[str, Any], embeds: torch.Tensor | None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield events, and how many tokens there are with each."""
        if embeds is None:
            yield 0, {"error": {"message": "Internal server error", "code": 500}}
            return
        written = self.written = []
        ids: list[int] = []
        logprobs: list[float] = []
        for token, logprob in self._decode(embeds):
            written.append(token)
            ids.append(token)
            logprobs.append(logprob)
            text = self.model.decoder_tokenizer.decode(written, skip_special_tokens=True)
            reason = None
            if token in request["stop_token_ids"] or any(stop in text for stop in request["stop"]):
                reason = "stop"
            elif len(written) == request["max_tokens"]:
                reason = "length"
            if reason or len(written) == 1 or len(ids) >= request["stream_interval"]:
                choice = {
                    "index": 0,
                    "text": self.text,
                    "token_ids": ids,
                    "logprobs": {"token_logprobs": logprobs},
                    "finish_reason": reason,
                }
                yield len(written), {"id": "cmpl-0", "choices": [choice]}
                ids, logprobs = [], []
            if reason:
                return

    @torch.no_grad()
    def _decode(self, embeds: torch.Tensor) -> Iterator[tuple[int, float]]:
        """Yield the likeliest tokens and their log-probabilities, without end."""
        decoder = self.model.decoder
        cache = DynamicCache(config=decoder.config)
        inputs: dict[str, torch.Tensor] = {"inputs_embeds": embeds[None]}
        while True:
            with self._lock:
                logits = decoder(**inputs, past_key_values=cache, use_cache=True).logits[0, -1]
            token = logits.argmax()
            yield int(token), float(logits.log_softmax(-1)[token])
            inputs = {"input_ids": token[None, None]}


def _read_item(data: bytes) -> torch.Tensor:
    """Read a `MultiModalKwargsItem` as vLLM does, `(memory, hidden)`."""
    elem = msgpack.unpackb(data)["image_embeds"]
    assert elem["field"] == ["batched", {"keep_on_cpu": False}]
    dtype, shape, raw = elem["data"]
    assert raw.code == 3
    flat = torch.frombuffer(bytearray(raw.data), dtype=torch.uint8)
    return flat.view(getattr(torch, dtype)).view(*shape)


def _as_generated(event: dict[str, Any]) -> None:
    """Turn an event of `/v1/completions` into one of `/inference/v1/generate`."""
    for choice in event.get("choices", ()):
        values = choice["logprobs"]["token_logprobs"]
        choice["logprobs"] = {"content": [{"logprob": value} for value in values]}
        del choice["text"]


def _answer(handler: BaseHTTPRequestHandler, status: int, body: object) -> None:
    data = json.dumps(body).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def _refuse(handler: BaseHTTPRequestHandler, status: int, message: str) -> None:
    _answer(handler, status, {"error": {"message": message, "code": status}})


def _chunk(handler: BaseHTTPRequestHandler, text: str) -> None:
    data = text.encode()
    handler.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
