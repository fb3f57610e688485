"""A Qdrant server on the loopback, for what no test machine has: HTTP in front of the embedded one.

It answers the endpoints `MemoryStore` uses by handing them to an in-memory client, and keeps every
request. What it cannot show is how a real server behaves under load or failure.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from qdrant_client import QdrantClient, models

# A real server's limit: max_request_size_mb.
MAX_BODY_BYTES = 32 * 2**20


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: Any
    nbytes: int


class QdrantStub:
    """Serves until `close`; `url` is where, `requests` what came in."""

    def __init__(self) -> None:
        self.client = QdrantClient(":memory:")
        self.requests: list[Request] = []
        # Path ending -> status, for requests that shall fail.
        self.failures: dict[str, int] = {}
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stub._serve(self)

            do_PUT = do_POST = do_DELETE = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self.client.close()

    def sent(self, method: str, path: str) -> list[Request]:
        """Return the requests to a path, oldest first."""
        return [each for each in self.requests if (each.method, each.path) == (method, path)]

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        data = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        path = handler.path.partition("?")[0]
        body = json.loads(data) if data else None
        headers = {name.lower(): value for name, value in handler.headers.items()}
        request = Request(handler.command, path, headers, body, len(data))
        self.requests.append(request)
        failure = next((code for end, code in self.failures.items() if path.endswith(end)), None)
        if failure is None and len(data) > MAX_BODY_BYTES:
            failure = 413
        if failure is None:
            try:
                with self._lock:
                    result = _answer(self.client, request)
            except ValueError:  # e.g. the collection exists already
                failure, result = 409, None
            answer = json.dumps({"result": result, "status": "ok", "time": 0.0}).encode()
        else:
            answer = json.dumps({"status": {"error": "refused by the test"}}).encode()
        handler.send_response(failure or 200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(answer)))
        handler.end_headers()
        handler.wfile.write(answer)


def _answer(client: QdrantClient, request: Request) -> object:
    """Return the `result` of a request to `/collections/NAME[/...]`."""
    _, _, name, *rest = request.path.split("/")
    answers: dict[tuple[str, str], Callable[[], object]] = {
        ("GET", "exists"): lambda: {"exists": client.collection_exists(name)},
        ("GET", ""): lambda: client.get_collection(name).model_dump(mode="json"),
        ("PUT", ""): lambda: _create(client, name, request.body),
        ("DELETE", ""): lambda: client.delete_collection(name),
        ("PUT", "index"): _acknowledge,
        ("PUT", "points"): lambda: _acknowledge(
            client.upsert(name, models.PointsList(**request.body).points)
        ),
        ("POST", "points/payload"): lambda: _acknowledge(
            client.set_payload(name, request.body["payload"], request.body["points"])
        ),
        ("POST", "points/delete"): lambda: _acknowledge(
            client.delete(name, models.PointIdsList(**request.body))
        ),
        ("POST", "points"): lambda: _retrieve(client, name, models.PointRequest(**request.body)),
        ("POST", "points/query"): lambda: _query(client, name, models.QueryRequest(**request.body)),
        ("POST", "points/count"): lambda: client.count(
            name, models.CountRequest(**request.body).filter
        ).model_dump(mode="json"),
        ("POST", "points/scroll"): lambda: _scroll(
            client, name, models.ScrollRequest(**request.body)
        ),
    }
    return answers[request.method, "/".join(rest)]()


def _acknowledge(result: object = None) -> object:
    return {"operation_id": 0, "status": "completed"}


def _create(client: QdrantClient, name: str, body: dict[str, Any]) -> object:
    wanted = models.CreateCollection(**body)
    return client.create_collection(name, wanted.vectors, metadata=wanted.metadata)


def _retrieve(client: QdrantClient, name: str, wanted: models.PointRequest) -> object:
    found = client.retrieve(name, wanted.ids, wanted.with_payload)
    return [each.model_dump(mode="json") for each in found]


def _query(client: QdrantClient, name: str, wanted: models.QueryRequest) -> object:
    return client.query_points(
        name,
        query=wanted.query,
        query_filter=wanted.filter,
        limit=wanted.limit or 10,
        with_payload=wanted.with_payload or False,
    ).model_dump(mode="json")


def _scroll(client: QdrantClient, name: str, wanted: models.ScrollRequest) -> object:
    records, offset = client.scroll(
        name,
        scroll_filter=wanted.filter,
        limit=wanted.limit or 10,
        offset=wanted.offset,
        with_payload=wanted.with_payload or True,
    )
    return {
        "points": [each.model_dump(mode="json") for each in records],
        "next_page_offset": offset,
    }
