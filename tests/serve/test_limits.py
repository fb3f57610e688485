"""What one client can take up: bytes, time, connections. Others are answered meanwhile."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from tests.serve.conftest import ACME, serving

CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Who wrote Hamlet?"}],
    "max_tokens": 2,
}


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A server that is quick to lose its patience."""
    with serving(
        tmp_path_factory.mktemp("store"),
        max_body_bytes=10_000,
        body_timeout_s=1.5,
        header_timeout_s=2.0,
    ) as served:
        yield served


def connect(served) -> socket.socket:
    address = urlsplit(served.address)
    return socket.create_connection((address.hostname, address.port), timeout=10)


def head(*lines: str, key: str = ACME) -> bytes:
    lines = ("POST /v1/retrieve HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", *lines)
    return "".join(
        f"{line}\r\n" for line in [*lines, "Content-Type: application/json", ""]
    ).encode()


def read_reply(connection: socket.socket) -> tuple[int, dict]:
    data = b""
    while b"\r\n\r\n" not in data or not data.rstrip().endswith(b"}"):
        received = connection.recv(65536)
        if not received:
            break
        data += received
    status, _, rest = data.partition(b"\r\n")
    return int(status.split()[1]), json.loads(rest.partition(b"\r\n\r\n")[2])


def read_to_the_end(connection: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while received := connection.recv(65536):
            data += received
    return data


def test_a_body_that_says_it_is_too_large_is_refused_unread(strict):
    with connect(strict) as connection:
        connection.sendall(head("Content-Length: 10001"))
        status, body = read_reply(connection)

    assert status == 413
    assert body["error"]["code"] == "body_too_large"
    assert "10000 bytes" in body["error"]["message"]


def test_a_body_without_a_length_is_counted(strict):
    def pieces():
        yield b'{"query": "'
        for _ in range(11):
            yield b"x" * 1000
        yield b'"}'

    with strict.client() as client:
        reply = client.post(
            "/v1/retrieve", content=pieces(), headers={"Content-Type": "application/json"}
        )

    assert reply.status_code == 413


def test_a_body_may_be_as_large_as_allowed(strict):
    start, end = b'{"query": "', b'"}'
    body = start + b"x" * (10_000 - len(start) - len(end)) + end
    with strict.client() as client:
        headers = {"Content-Type": "application/json"}
        assert client.post("/v1/retrieve", content=body, headers=headers).status_code == 200


def test_a_slow_body_is_given_up(strict):
    with connect(strict) as connection:
        connection.sendall(head("Content-Length: 100"))
        with contextlib.suppress(OSError):  # it may have given up
            for byte in b'{"q':
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        status, body = read_reply(connection)

    assert status == 408
    assert "did not arrive within" in body["error"]["message"]


def test_slow_headers_are_cut_off_while_others_are_answered(strict):
    # One header byte now and then keeps a connection alive without ever asking anything.
    lorises = [connect(strict) for _ in range(100)]
    for connection in lorises:
        with contextlib.suppress(OSError):  # the first may have been cut off by now
            connection.sendall(b"GET /healthz HTTP/1.1\r\nX-A: ")
    with strict.client() as client:
        assert client.get("/healthz").status_code == 200
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    deadline = time.monotonic() + 60
    for connection in lorises:
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline:
                connection.sendall(b"x")
                connection.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(1):
                        break
        connection.close()

    assert time.monotonic() < deadline


def test_a_refused_body_cannot_go_on_forever(strict):
    with connect(strict) as connection:
        connection.sendall(head("Transfer-Encoding: chunked", key="wrong-key-0123456789"))
        status, _ = read_reply(connection)
        deadline = time.monotonic() + 60
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline:
                connection.sendall(b"1\r\nx\r\n")
                time.sleep(0.02)

    assert status == 401
    assert time.monotonic() < deadline


def test_what_is_no_http_is_answered_in_json(strict):
    with connect(strict) as connection:
        connection.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        status, body = read_reply(connection)

    assert status == 400
    assert body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("length", ["-1", "x", "1, 2", "9" * 30])
def test_a_length_that_is_none_is_refused(strict, length):
    with connect(strict) as connection:
        connection.sendall(head(f"Content-Length: {length}"))
        status, _ = read_reply(connection)

    assert status in (400, 413)


def test_headers_have_a_size_limit(strict):
    with connect(strict) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(head("X-Long: " + "x" * 200_000))
        data = read_to_the_end(connection)

    assert data == b"" or data.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))


def test_an_answer_that_takes_too_long_is_given_up(tmp_path):
    asks = [{**CHAT, "stream": stream} for stream in (False, True)]
    with serving(tmp_path, timeout_s=2.0) as served, served.client() as client:
        # The model is busy for longer than a request may take.
        with served.held(), ThreadPoolExecutor(2) as threads:
            late = list(
                threads.map(lambda ask: client.post("/v1/chat/completions", json=ask), asks)
            )
        after = client.post("/v1/chat/completions", json=CHAT)

    for reply in late:
        assert reply.status_code == 504
        assert reply.json()["error"]["code"] == "timeout"
    assert after.status_code == 200
