"""Load on `softrag serve`: clients that stream answers, then more of them than it lets in.

    python benchmarks/serve_load.py --out benchmarks/results/2026-11-25-serve-load.json

Every client asks for a fact of its own, again and again, and compares each answer and its sources
with those of the same question asked alone. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import httpx

PACKAGES = ("torch", "transformers", "qdrant-client", "fastapi", "uvicorn", "softrag-memory")
FIRST = ("Ar", "Bel", "Cor", "Dun", "Es", "Far", "Gal", "Hol")
LAST = ("dor", "lin", "mouth", "nes", "port", "rick", "stad", "vik")
PLACES = [first + last for first in FIRST for last in LAST]
DOCUMENTS = [
    {
        "text": f"The lighthouse of {place} was built in {1700 + 3 * number} and is "
        f"{20 + number} metres high. Its keeper was called {LAST[number % 8].title()}.",
        "source": f"{place}.txt",
        "title": f"Lighthouse of {place}",
    }
    for number, place in enumerate(PLACES)
]


class Reply(NamedTuple):
    """What a client got."""

    status: int
    text: str = ""
    source: str = ""
    error: str = ""
    first_s: float = 0.0
    total_s: float = 0.0


def main() -> None:
    """Measure, print a line each, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64, help="64 places are known")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max-running", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--model", default="softrag-demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "softrag", "serve", "--json", "--port", "0"]
        command += ["--store", folder, "--model", options.model, "--name", "model"]
        command += ["--device", options.device, "--max-running", str(options.max_running)]
        command += ["--max-waiting", str(options.clients)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address = json.loads(server.stdout.readline())["address"]
            figures = asyncio.run(measure(address, server.pid, options))
        finally:
            server.send_signal(signal.SIGTERM)
            code = server.wait(150)
    figures["server's exit code"] = code
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    result = {
        "figures": figures,
        "device": f"{options.device}, {platform.machine()}, {os.cpu_count()} cores",
        "load average at the end": os.getloadavg(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit,
        "command": "python " + " ".join(sys.argv),
    }
    for name, value in figures.items():
        print(f"{name}: {value}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


async def measure(address: str, pid: int, options: argparse.Namespace) -> dict[str, object]:
    """Ask alone, then together, then too much."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=150, limits=limits) as client:
        added = await client.post("/v1/documents", json={"documents": DOCUMENTS})
        added.raise_for_status()
        places = PLACES[: options.clients]
        alone = {place: await ask(client, place, options.max_tokens) for place in places}
        assert {reply.status for reply in alone.values()} == {200}, "alone"
        before = resident_mb(pid)

        stop = time.monotonic() + options.seconds
        watch = asyncio.ensure_future(watch_memory(pid, stop))
        loops = [repeat(client, place, stop, options.max_tokens) for place in places]
        together = dict(zip(places, await asyncio.gather(*loops), strict=True))
        resident = await watch

        crowd = 2 * (options.max_running + options.clients)
        burst = await asyncio.gather(
            *(ask(client, places[n % len(places)], options.max_tokens) for n in range(crowd))
        )
        after = await ask(client, places[0], options.max_tokens)
        metrics = (await client.get("/metrics")).text

    replies = [(place, reply) for place, all_ in together.items() for reply in all_]
    texts = Counter(reply.text for reply in alone.values())
    right = [reply for place, reply in replies if same(reply, alone[place])]
    foreign = [
        reply
        for place, reply in replies
        if reply.status == 200
        and (reply.source != alone[place].source or is_anothers(reply, alone[place], texts))
    ]
    late = sorted(reply.first_s for reply in right)
    half = len(resident) // 2
    return {
        "clients": options.clients,
        "answers": len(replies),
        "answers/s": round(len(replies) / options.seconds, 2),
        "errors": sum(reply.status != 200 or bool(reply.error) for _, reply in replies),
        "error messages": sorted({reply.error for _, reply in replies if reply.error})[:5],
        "answers that equal the one asked alone": len(right),
        "answers or sources of another client": len(foreign),
        "different facts among the answers asked alone": len(texts),
        "first token, median s": round(statistics.median(late), 3),
        "first token, 95th percentile s": round(late[int(0.95 * len(late))], 3),
        "asked alone: first token, median s": round(
            statistics.median(reply.first_s for reply in alone.values()), 3
        ),
        "resident MB before": before,
        "resident MB, largest of the first half": max(resident[:half]),
        "resident MB, largest of the second half": max(resident[half:]),
        "burst: requests": crowd,
        "burst: statuses": dict(Counter(str(reply.status) for reply in burst)),
        "burst: answers that equal the one asked alone": sum(
            same(reply, alone[places[n % len(places)]]) for n, reply in enumerate(burst)
        ),
        "after the burst": after.status,
        "tokens saved": float(metrics.split("\nsoftrag_tokens_saved_total ")[1].split("\n")[0]),
    }


def same(reply: Reply, expected: Reply) -> bool:
    """Tell whether a reply is the one expected."""
    return (reply.status, reply.text, reply.source, reply.error) == (
        200,
        expected.text,
        expected.source,
        "",
    )


def is_anothers(reply: Reply, expected: Reply, texts: Counter[str]) -> bool:
    """Tell whether a text is not the expected one, but one that another question got."""
    return reply.text != expected.text and reply.text in texts


async def repeat(
    client: httpx.AsyncClient, place: str, stop: float, max_tokens: int
) -> list[Reply]:
    """Ask one question until the time is over."""
    replies = []
    while time.monotonic() < stop:
        replies.append(await ask(client, place, max_tokens))
    return replies


async def ask(client: httpx.AsyncClient, place: str, max_tokens: int) -> Reply:
    """Stream one answer."""
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": f"When was the lighthouse of {place} built?"}],
        "max_tokens": max_tokens,
        "stream": True,
        "softrag": {"k": 3},
    }
    started = time.monotonic()
    first_s, text, source = 0.0, "", ""
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                wait = response.headers.get("retry-after", "no Retry-After")
                return Reply(response.status_code, error=f"{response.text} {wait}")
            done = False
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if not data or data == "[DONE]":
                    done = done or bool(data)
                    continue
                event = json.loads(data)
                if "error" in event:
                    return Reply(200, text, source, error=str(event["error"]))
                source = source or event["softrag"]["sources"][0]["source"]
                piece = event["choices"][0]["delta"]["content"]
                first_s = first_s or (time.monotonic() - started if piece else 0.0)
                text += piece or ""
    except httpx.HTTPError as error:
        return Reply(0, text, source, error=repr(error))
    error = "" if done else "the stream broke off"
    return Reply(200, text, source, error, first_s, time.monotonic() - started)


async def watch_memory(pid: int, stop: float) -> list[int]:
    """Return the server's resident memory at every half second, in MB."""
    sizes = []
    while time.monotonic() < stop:
        sizes.append(resident_mb(pid))
        await asyncio.sleep(0.5)
    return sizes


def resident_mb(pid: int) -> int:
    """Return a process's resident memory in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) // 1024


if __name__ == "__main__":
    main()
