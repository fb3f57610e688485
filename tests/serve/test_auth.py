"""Nobody gets in without a key, and nobody gets across to another tenant."""

from __future__ import annotations

import pytest

from softrag.serve import Keys, ServeSettings
from tests.serve.conftest import ACME, GLOBEX, METRICS, serving

QUESTION = "What is the secret of Globex?"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 2}
REQUESTS = [
    ("GET", "/v1/models", None),
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/documents", {"documents": [{"text": "x"}]}),
    ("DELETE", "/v1/documents?id=x", None),
    ("POST", "/v1/retrieve", {"query": "x"}),
    ("GET", "/metrics", None),
    ("GET", "/nowhere", None),
]
WRONG = [
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": f"Bearer {ACME}x"},
    {"Authorization": f"Bearer {ACME[:-1]}"},
    {"Authorization": f"Bearer {ACME} {GLOBEX}"},
    {"Authorization": f"Bearer {ACME.upper()}"},
    {"Authorization": f"Basic {ACME}"},
    {"Authorization": ACME},
    {"Authorization": b"Bearer \xff\xfe"},
    {"X-Api-Key": ACME},
    {"Cookie": f"Authorization=Bearer {ACME}"},
]


@pytest.mark.parametrize("headers", WRONG, ids=str)
def test_without_a_right_key_nothing_answers(served, headers):
    with served.client(None) as client:
        for method, path, body in REQUESTS:
            reply = client.request(method, path, json=body, headers=headers)

            assert reply.status_code == 401, path
            assert reply.json()["error"]["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"


def test_two_keys_in_one_request_are_no_key(served):
    headers = [("Authorization", f"Bearer {key}") for key in (ACME, GLOBEX)]
    with served.client(None) as client:
        assert client.get("/v1/models", headers=headers).status_code == 401


def test_a_key_in_the_address_does_not_count(served):
    with served.client(None) as client:
        for query in (f"key={ACME}", f"api_key={ACME}", f"Authorization=Bearer%20{ACME}"):
            assert client.get(f"/v1/models?{query}").status_code == 401


def test_health_and_the_description_need_no_key(served):
    with served.client(None) as client:
        assert client.get("/healthz").json() == {"status": "ok", "model": "tiny"}
        assert client.get("/openapi.json").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/healthz/../v1/models",
        "/healthz/%2e%2e/v1/models",
        "/healthz%2f..%2fv1/models",
        "//v1/models",
        "/v1//models",
        "/./v1/models",
        "/V1/models",
        "/v1/models/",
        "/v1/models;/healthz",
        "/healthz?/../v1/models",
        "/openapi.json/../v1/documents",
        "/%76%31/models",
        "/v1/models%00/healthz",
        "/v1/models%23/healthz",
    ],
)
def test_no_spelling_of_a_path_leads_around_the_key(served, path):
    import http.client
    from urllib.parse import urlsplit

    # Not through httpx, which would tidy the path up.
    connection = http.client.HTTPConnection(urlsplit(served.address).netloc, timeout=10)
    connection.putrequest("GET", path, skip_host=True)
    connection.putheader("Host", "localhost")
    connection.endheaders()
    reply = connection.getresponse()
    text = reply.read()
    connection.close()

    assert reply.status in (401, 404) or path.startswith("/healthz?")
    assert b'"data"' not in text


def test_a_tenant_sees_its_own_documents_only(served):
    with served.client(ACME) as acme, served.client(GLOBEX) as globex:
        (theirs,) = globex.post("/v1/retrieve", json={"query": QUESTION}).json()["data"]
        seen = acme.post("/v1/retrieve", json={"query": QUESTION, "k": 100}).json()["data"]
        answer = acme.post("/v1/chat/completions", json={**CHAT, "softrag": {"k": 100}}).json()

    assert theirs["source"] == "plans.txt"
    assert len(seen) == len(answer["softrag"]["sources"]) == 8
    assert all("Globex" not in hit["text"] for hit in seen)


@pytest.mark.parametrize(
    "where",
    [
        {"source": "plans.txt"},
        {"level": "secret"},
        {"level": ["secret", None]},
        {"tenant": "globex"},
        {"collection": "softrag_globex"},
        {"chunk_id": None, "level": "secret"},
        {"title": [None, "x"]},
    ],
)
def test_no_filter_reaches_another_tenants_documents(served, where):
    with served.client(ACME) as acme:
        for _ in range(2):
            hits = acme.post("/v1/retrieve", json={"query": QUESTION, "where": where}).json()[
                "data"
            ]
            body = {**CHAT, "softrag": {"where": where}}
            answer = acme.post("/v1/chat/completions", json=body).json()

            assert all("Globex" not in hit["text"] for hit in hits)
            sources = answer["softrag"]["sources"]
            assert all("Globex" not in source["text"] for source in sources)


def test_another_tenants_ids_and_sources_delete_nothing(served):
    globex = served.engines["globex"].store
    ids = sorted(globex.ids_of_source("plans.txt"))
    with served.client(ACME) as acme:
        by_id = acme.delete("/v1/documents", params={"id": ids}).json()
        by_source = acme.delete("/v1/documents", params={"source": "plans.txt"}).json()

    assert by_id == by_source == {"deleted": 0}
    assert globex.contains(ids) == set(ids)


def test_the_same_source_of_two_tenants_stays_two(own_server):
    document = {"text": "Acme makes anvils.", "source": "plans.txt"}
    with own_server.client(ACME) as acme, own_server.client(GLOBEX) as globex:
        acme.post("/v1/documents", json={"documents": [document]})
        (found,) = globex.post("/v1/retrieve", json={"query": QUESTION}).json()["data"]

    assert "doomsday" in found["text"]


@pytest.mark.parametrize(
    "field", ["tenant", "collection", "store", "namespace", "partition", "user_id"]
)
def test_a_request_cannot_name_its_tenant(served, field):
    with served.client(ACME) as acme:
        body = {"query": QUESTION, field: "globex"}
        assert acme.post("/v1/retrieve", json=body).status_code == 400
        reply = acme.post(
            f"/v1/retrieve?{field}=globex",
            json={"query": QUESTION},
            headers={f"X-{field}": "globex", "OpenAI-Organization": "globex"},
        )
        assert all("Globex" not in hit["text"] for hit in reply.json()["data"])


def test_metrics_have_a_key_of_their_own(served):
    with served.client(METRICS) as client:
        assert client.get("/metrics").status_code == 200
        assert client.get("/v1/models").status_code == 401
    with served.client(ACME) as client:
        assert client.get("/metrics").status_code == 401


def test_without_keys_everybody_on_this_machine_may_ask(tmp_path):
    with serving(tmp_path, keys=None, metrics_key=None) as served, served.client(None) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/metrics").status_code == 200


def test_without_keys_no_server_listens_to_other_machines():
    with pytest.raises(ValueError, match=r"may only listen on this machine.*--keys FILE"):
        ServeSettings(host="0.0.0.0")


def test_keys_are_read_from_lines_and_commas(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{ACME}\n  globex  {GLOBEX}  # theirs\n\n")

    keys = Keys.read(file)

    assert keys.tenants == {"", "globex"}
    assert keys.tenant_of(ACME.encode()) == ""
    assert keys.tenant_of(GLOBEX.encode()) == "globex"
    assert keys.tenant_of(b"globex") is None
    assert Keys.parse(f"a {ACME}, b {GLOBEX}").tenant_of(GLOBEX.encode()) == "b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nothing\n", "There are no keys"),
        ("short", "at least 16 printable"),
        (f"a b {ACME}", "has 3 words"),
        (f"../evil {ACME}", r"Tenant '../evil' is unfit"),
        (f"UPPER {ACME}", "is unfit"),
        (f"a {ACME}\nb {ACME}", "stands for both 'a' and 'b'"),
        ("schlüssel-schlüssel", "printable ASCII"),
    ],
)
def test_unfit_keys_are_refused_without_being_repeated(text, message):
    with pytest.raises(ValueError, match=message) as refused:
        Keys.parse(text)

    assert ACME not in str(refused.value)
