"""`softrag serve` from its start to its end: what it prints, and what it finishes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from softrag.cli import app
from tests.checkpoints import build_checkpoint
from tests.serve.conftest import ACME

COMMAND = Path(__file__).parent.parent / "softrag_command.py"
HEADERS = {"Authorization": f"Bearer {ACME}"}


@pytest.fixture
def process(tmp_path):
    environment = {
        **os.environ,
        "SOFTRAG_MODEL": str(build_checkpoint()),
        "SOFTRAG_STORE": str(tmp_path / "store"),
        "SOFTRAG_API_KEYS": f"acme {ACME}",
    }
    process = subprocess.Popen(
        [sys.executable, str(COMMAND), "serve", "--port", "0", "--name", "tiny", "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def wait_until_refused(address):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            httpx.get(f"{address}/healthz")
        except httpx.ConnectError:
            return
        except httpx.TransportError:
            pass  # it stopped between the knock and the answer
    pytest.fail("the server still lets clients in")


def test_a_running_answer_is_finished_before_the_server_ends(process, tmp_path):
    started = json.loads(process.stdout.readline())
    assert started["model"] == "tiny"
    chat = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Who?"}],
        "max_tokens": 200,
        "stream": True,
    }
    with httpx.Client(base_url=started["address"], headers=HEADERS, timeout=60) as client:
        added = client.post("/v1/documents", json={"documents": [{"text": "Rome is a city."}]})
        assert added.json()["chunks_added"] == 1
        with client.stream("POST", "/v1/chat/completions", json=chat) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            wait_until_refused(started["address"])
            events = [line for line in lines if line]

    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] in ("stop", "length")
    assert process.wait(60) == 0
    # The tenant's documents lie in a folder of its own.
    assert (tmp_path / "store" / "tenants" / "acme" / "collection").is_dir()


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        arguments = ["serve", "--store", str(tmp_path / "store"), "--port", port]
        result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 1
    assert f"Nothing can listen at 127.0.0.1:{port}" in result.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "Without keys a server may only listen on this machine"),
        (["--max-running", "1000"], "max_running must be 1 to 48"),
        (["--timeout", "0"], "timeout_s must be more than 0"),
        (["--timeout", "inf"], "timeout_s must be more than 0 and finite, found inf"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_loaded(arguments, message, tmp_path):
    result = CliRunner().invoke(app, ["serve", "--store", str(tmp_path / "store"), *arguments])

    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "store").exists()
