"""A Qdrant server on the loopback, for what no test machine has: HTTP in front of the embedded one.

It answers the endpoints `MemoryStore` uses by handing them to an in-memory client, and keeps every
request. What it cannot show is how a real server behaves under load or failure.
"""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
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
    """Serves until `close`; `url` is where, `requests` what came in.

    Args:
        certificate: A PEM file with certificate and key: speak TLS.
    """

    def __init__(self, certificate: Path | None = None) -> None:
        self.client = QdrantClient(":memory:")
        self.requests: list[Request] = []
        # Path ending -> status, for requests that shall fail.
        self.failures: dict[str, int] = {}
        self.snapshots: dict[str, bytes] = {}
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stub._serve(self)

            do_PUT = do_POST = do_DELETE = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        scheme = "https" if certificate else "http"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_port}"

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
        is_json = handler.headers.get("Content-Type", "").startswith("application/json")
        body = json.loads(data) if data and is_json else data or None
        headers = {name.lower(): value for name, value in handler.headers.items()}
        request = Request(handler.command, path, headers, body, len(data))
        self.requests.append(request)
        failure = next((code for end, code in self.failures.items() if path.endswith(end)), None)
        if failure is None and len(data) > MAX_BODY_BYTES:
            failure = 413
        if failure is None:
            try:
                with self._lock:
                    if "/snapshots" in path:
                        result = self._snapshot(request)
                    else:
                        result = _answer(self.client, request)
            except ValueError:  # e.g. the collection exists already
                failure, result = 409, None
            answer = (
                result
                if isinstance(result, bytes)
                else json.dumps({"result": result, "status": "ok", "time": 0.0}).encode()
            )
        else:
            answer = json.dumps({"status": {"error": "refused by the test"}}).encode()
        handler.send_response(failure or 200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(answer)))
        handler.end_headers()
        handler.wfile.write(answer)

    def _snapshot(self, request: Request) -> object:
        """Keep points and settings as JSON, in place of a server's own format."""
        _, _, collection, _, *rest = request.path.split("/")
        if request.method == "POST" and not rest:
            points, _ = self.client.scroll(collection, limit=10**6, with_vectors=True)
            data = json.dumps(
                {
                    "config": self.client.get_collection(collection).model_dump(mode="json"),
                    "points": [point.model_dump(mode="json") for point in points],
                }
            ).encode()
            self.snapshots["all.snapshot"] = data
            checksum = hashlib.sha256(data).hexdigest()
            return {"name": "all.snapshot", "size": len(data), "checksum": checksum}
        if request.method == "GET":
            return self.snapshots[rest[0]]
        if request.method == "DELETE":
            return bool(self.snapshots.pop(rest[0]))
        # An upload of one file: the part of the body that is JSON.
        start, end = request.body.index(b"{"), request.body.rindex(b"}") + 1
        kept = json.loads(request.body[start:end])
        config = models.CollectionInfo(**kept["config"]).config
        if self.client.collection_exists(collection):
            self.client.delete_collection(collection)
        self.client.create_collection(collection, config.params.vectors, metadata=config.metadata)
        points = [models.PointStruct(**{k: p[k] for k in ("id", "vector", "payload")})
                  for p in kept["points"]]  # fmt: skip
        self.client.upsert(collection, points)
        return True


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
        with_vectors=wanted.with_vector or False,
    )
    return {
        "points": [each.model_dump(mode="json") for each in records],
        "next_page_offset": offset,
    }
