"""What documents' routes promise: what was added is found, what was deleted is not."""

from __future__ import annotations

import pytest

from tests.serve.conftest import ACME, GLOBEX

ROME = {
    "text": "Rome was founded in 753 BC.",
    "source": "rome.txt",
    "title": "Rome",
    "metadata": {"year": -753, "tags": ["city", "old"]},
}


def chat(client, **softrag):
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "When was Rome founded?"}],
        "max_tokens": 2,
        "softrag": softrag,
    }
    return client.post("/v1/chat/completions", json=body)


def test_documents_are_added_found_answered_from_and_deleted(own_server):
    with own_server.client() as client:
        added = client.post("/v1/documents", json={"documents": [ROME, {"text": " "}]}).json()
        again = client.post("/v1/documents", json={"documents": [ROME]}).json()
        (found,) = client.post(
            "/v1/retrieve", json={"query": "Rome", "k": 3, "where": {"tags": "old"}}
        ).json()["data"]
        answer = chat(client, k=1).json()
        deleted = client.delete("/v1/documents", params={"source": "rome.txt"}).json()
        gone = client.post("/v1/retrieve", json={"query": "Rome", "where": {"year": -753}}).json()

    assert (added["documents"], added["chunks_added"]) == (1, 1)
    assert "no text" in added["errors"][0]["message"]
    assert (again["chunks_added"], again["chunks_unchanged"]) == (0, 1)
    assert {name: found[name] for name in ROME} == ROME
    assert [source["id"] for source in answer["softrag"]["sources"]] == [found["id"]]
    assert deleted == {"deleted": 1}
    assert gone["data"] == []


def test_chunks_are_deleted_by_id(own_server):
    with own_server.client() as client:
        hits = client.post("/v1/retrieve", json={"query": "Paris", "k": 2}).json()["data"]
        ids = [hit["id"] for hit in hits]
        deleted = client.delete("/v1/documents", params={"id": [*ids, "unknown"]}).json()

    assert deleted == {"deleted": 2}
    assert own_server.engines["acme"].store.contains(ids) == set()


def test_an_empty_store_says_that_documents_are_missing(own_server):
    with own_server.client(GLOBEX) as client:
        client.delete("/v1/documents", params={"source": "plans.txt"})
        replies = [chat(client), client.post("/v1/retrieve", json={"query": "Rome"})]

    for reply in replies:
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "no_documents"


@pytest.mark.parametrize(
    ("method", "path", "body", "named"),
    [
        ("POST", "/v1/documents", {"documents": []}, "documents"),
        ("POST", "/v1/documents", {"documents": [{"txt": "x"}]}, "documents.0.text"),
        ("POST", "/v1/documents", {"documents": [{"text": "x", "id": "y"}]}, "documents.0.id"),
        ("POST", "/v1/documents", {}, "documents"),
        ("POST", "/v1/retrieve", {"query": "x", "k": 101}, "k"),
        ("POST", "/v1/retrieve", {"query": "x", "where": {"a": {"b": 1}}}, "where.a"),
        ("DELETE", "/v1/documents", None, None),
    ],
)
def test_a_wrong_request_says_what_is_wrong(served, method, path, body, named):
    with served.client(ACME) as client:
        reply = client.request(method, path, json=body)

    error = reply.json()["error"]
    assert reply.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert named is None or error["param"].startswith(named)


@pytest.mark.parametrize(
    "body",
    [
        {"query": " "},
        {"query": "x", "where": {'a"b': 1}},
        {"query": "x", "where": {"": 1}},
    ],
)
def test_what_the_engine_refuses_is_a_wrong_request(served, body):
    with served.client() as client:
        reply = client.post("/v1/retrieve", json=body)

    assert reply.status_code == 400


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        '"x"',
        '{"query": NaN}',
        "[" * 10_000,
        '{"query": "x", "where": {"a": 1e999}}',
        '{"query": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: text[:12],
)
def test_what_is_no_request_is_refused(served, text):
    with served.client() as client:
        reply = client.post(
            "/v1/retrieve", content=text, headers={"Content-Type": "application/json"}
        )

    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


def test_text_that_is_no_unicode_is_refused(served):
    headers = {"Content-Type": "application/json"}
    with served.client() as client:
        for body in (
            '{"query": "\\ud800"}',
            '{"query": "x", "\\ud800": 1}',
            '{"query": "x", "where": {"\\ud800": 1}}',
            '{"query": "x", "where": {"a": "\\ud800"}}',
        ):
            reply = client.post("/v1/retrieve", content=body, headers=headers)
            assert reply.status_code == 400, body
        reply = client.post("/v1/retrieve", content=b'{"query": "\xff"}', headers=headers)
        assert reply.status_code == 400


def test_a_body_that_is_not_sent_as_json_says_how_to_send_it(served):
    with served.client() as client:
        form = client.post("/v1/retrieve", data={"query": "x"}).json()["error"]
        text = client.post("/v1/retrieve", json="text").json()["error"]

    assert form == text
    assert "a JSON object, sent with Content-Type: application/json" in form["message"]
