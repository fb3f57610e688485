"""What is counted, and that nothing is counted twice."""

from __future__ import annotations

from tests.serve.conftest import ACME, METRICS, serving

QUESTION = "Who wrote Hamlet and Macbeth?"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4}


def test_answers_tokens_and_refusals_are_counted(tmp_path):
    with serving(tmp_path) as served, served.client() as client:
        usages = []
        for softrag in ({"k": 3}, {"k": 2}, {"mode": "closed"}):
            reply = client.post("/v1/chat/completions", json={**CHAT, "softrag": softrag}).json()
            usages.append(reply["usage"])
        client.post("/v1/chat/completions", json={**CHAT, "n": 2})
        client.get("/nowhere/at/all")
        client.get("/v1/models", headers={"Authorization": "Bearer wrong"})
        text = client.get("/metrics", headers={"Authorization": f"Bearer {METRICS}"}).text

    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    def value(name: str) -> float:
        return float(samples[name])

    path = 'path="/v1/chat/completions"'
    assert value(f'softrag_requests_total{{{path},status="200"}}') == 3
    assert value(f'softrag_requests_total{{{path},status="400"}}') == 1
    assert value('softrag_requests_total{path="other",status="404"}') == 1
    assert value('softrag_requests_total{path="other",status="401"}') == 1
    for kind in ("prompt", "completion"):
        expected = sum(usage[f"{kind}_tokens"] for usage in usages)
        assert value(f'softrag_tokens_total{{kind="{kind}"}}') == expected
    soft = sum(usage["soft_tokens"] for usage in usages)
    assert value('softrag_tokens_total{kind="soft"}') == soft
    saved = sum(usage["text_prompt_tokens"] - usage["prompt_tokens"] for usage in usages)
    assert value("softrag_tokens_saved_total") == saved > 0
    assert value('softrag_memories_total{origin="store"}') == 5
    assert value('softrag_memories_total{origin="made"}') == 0
    assert value("softrag_time_to_first_token_seconds_count") == 3
    assert value("softrag_answer_seconds_count") == 3
    assert value("softrag_running_answers") == value("softrag_waiting_answers") == 0
    assert ACME not in text
    assert "acme" not in text
    assert QUESTION not in text
