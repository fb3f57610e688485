"""What happens when more is asked than can be answered."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from softrag.serve.admission import Admission
from softrag.serve.errors import ApiError
from tests.serve.conftest import METRICS, serving

CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Who wrote Hamlet?"}],
    "max_tokens": 2,
}


async def test_places_are_given_in_order_and_the_rest_is_refused():
    admission = Admission(running=2, waiting=2)
    order = []

    async def run(name):
        leave = await admission.enter(10)
        order.append(name)
        await asyncio.sleep(0)
        leave()

    leaves = [await admission.enter(10) for _ in range(2)]
    waiting = [asyncio.ensure_future(run(name)) for name in "ab"]
    await asyncio.sleep(0)
    assert (admission.n_running, admission.n_waiting) == (2, 2)
    with pytest.raises(ApiError, match="at its limit: 2 requests wait") as refused:
        await admission.enter(10)
    for leave in leaves:
        leave()
    await asyncio.gather(*waiting)

    assert refused.value.status_code == 429
    assert int(refused.value.headers["Retry-After"]) >= 1
    assert order == ["a", "b"]
    assert (admission.n_running, admission.n_waiting) == (0, 0)


async def test_who_gives_up_leaves_no_gap():
    admission = Admission(running=1, waiting=3)
    leave = await admission.enter(10)
    cancelled = asyncio.ensure_future(admission.enter(10))
    patient = asyncio.ensure_future(admission.enter(10))
    await asyncio.sleep(0)
    with pytest.raises(ApiError, match="No place came free") as late:
        await admission.enter(0.01)
    cancelled.cancel()
    await asyncio.sleep(0)
    assert admission.n_waiting == 1
    leave()
    (await patient)()

    assert late.value.status_code == 503
    assert (admission.n_running, admission.n_waiting) == (0, 0)


async def test_a_place_that_comes_free_for_a_cancelled_one_goes_to_the_next():
    admission = Admission(running=1, waiting=3)
    leave = await admission.enter(10)
    cancelled = asyncio.ensure_future(admission.enter(10))
    patient = asyncio.ensure_future(admission.enter(10))
    await asyncio.sleep(0)
    leave()
    cancelled.cancel()
    (await patient)()

    assert admission.n_running == 0


def metrics(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics", headers={"Authorization": f"Bearer {METRICS}"}).text.splitlines()
    samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_over_capacity_is_refused_with_429_and_everybody_else_is_answered(tmp_path):
    with (
        serving(tmp_path, max_running=2, max_waiting=3) as served,
        served.client() as client,
        ThreadPoolExecutor(12) as threads,
    ):
        with served.held():
            jobs = [
                threads.submit(client.post, "/v1/chat/completions", json=CHAT) for _ in range(12)
            ]
            until(lambda: sum(job.done() for job in jobs) == 7)
            counted = metrics(client)
        replies = [job.result() for job in jobs]

    statuses = sorted(reply.status_code for reply in replies)
    assert statuses == [200] * 5 + [429] * 7
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert refused.json()["error"]["code"] == "overloaded"
    assert int(refused.headers["retry-after"]) >= 1
    assert counted["softrag_running_answers"] == 2
    assert counted["softrag_waiting_answers"] == 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_gives_its_place_back(tmp_path, stream):
    body = {**CHAT, "max_tokens": 1000, "stream": stream}
    with serving(tmp_path, max_running=1) as served, served.client() as client:
        if stream:
            with client.stream("POST", "/v1/chat/completions", json=body) as reply:
                next(reply.iter_lines())
        else:
            with served.held(), pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", json=body, timeout=0.3)
        until(lambda: metrics(client)["softrag_running_answers"] == 0)
        counted = metrics(client)

    # It was stopped, not written to its end.
    assert counted['softrag_tokens_total{kind="completion"}'] == 0


def test_writes_do_not_run_together(tmp_path):
    with serving(tmp_path) as served:
        engine = served.engines["acme"]
        running, most = 0, 0
        lock = threading.Lock()
        add = engine.compressor.compress

        def counted(texts):
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            made = add(texts)
            with lock:
                running -= 1
            return made

        engine.compressor.compress = counted
        with served.client() as client, ThreadPoolExecutor(4) as threads:
            bodies = [{"documents": [{"text": f"{n}", "source": "s"}]} for n in range(6)]
            replies = list(
                threads.map(lambda body: client.post("/v1/documents", json=body), bodies)
            )

        assert [reply.status_code for reply in replies] == [200] * 6
        assert most == 1
        assert len(engine.store.ids_of_source("s")) == 1
