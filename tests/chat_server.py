"""A chat server on the loopback: OpenAI's wire format, replies from a function.

A prompt that the function raises a `ValueError` for is refused with status 400.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class ChatServer:
    """What was asked, and what to say; `failures` are status codes to answer with first."""

    reply: Callable[[str], str]
    failures: list[int] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    url: str = ""

    @property
    def prompts(self) -> list[str]:
        return [request["messages"][0]["content"] for request in self.requests]


@contextmanager
def serve_chat(reply: Callable[[str], str], *, failures: list[int] | None = None) -> Iterator:
    chat = ChatServer(reply, failures or [])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send({"data": [{"id": "listed-model"}]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            chat.keys.add(self.headers.get("Authorization"))
            if chat.failures:
                self.send({"error": "no"}, chat.failures.pop(0))
                return
            assert self.path == "/v1/chat/completions"
            chat.requests.append(body)
            try:
                content = chat.reply(body["messages"][0]["content"])
            except ValueError as error:
                self.send({"error": str(error)}, 400)
                return
            self.send({"choices": [{"message": {"role": "assistant", "content": content}}]})

        def send(self, value: object, status: int = 200) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    chat.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield chat
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
