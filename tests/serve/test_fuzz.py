"""Requests made up from the server's own description: none is answered with a 5xx.

`make test` tries a few of each kind; the thousand and more of a release:
`SOFTRAG_FUZZ=400 pytest tests/serve/test_fuzz.py`.
"""

from __future__ import annotations

import os

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase

from tests.serve.conftest import ACME, serving

EXAMPLES = int(os.environ.get("SOFTRAG_FUZZ", "20"))
HEADERS = {"Authorization": f"Bearer {ACME}"}


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("store")) as served:
        yield served


@pytest.fixture(scope="module")
def schema(fuzzed):
    with fuzzed.client() as client:
        description = client.get("/openapi.json").json()
    return schemathesis.openapi.from_dict(description)


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(
    "operation",
    [
        ("GET", "/v1/models/{model}"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/documents"),
        ("DELETE", "/v1/documents"),
        ("POST", "/v1/retrieve"),
    ],
    ids=" ".join,
)
def test_no_request_breaks_the_server(fuzzed, schema, operation, mode):
    method, path = operation
    cases = schema[path][method].as_strategy(generation_mode=mode)
    statuses = set()

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(cases)
    def ask(case):
        if isinstance(case.body, dict) and "model" in case.body:
            # Hardly any made-up conversation asks something of this model, and behind one that does
            # not little is tried.
            case.body["model"] = "tiny"
            if mode.value == "positive":
                case.body["messages"].append({"role": "user", "content": "Who wrote Hamlet?"})
        reply = case.call(base_url=fuzzed.address, headers=HEADERS)
        statuses.add(reply.status_code)
        assert reply.status_code < 500, reply.text

    ask()

    if mode.value == "positive" and method != "GET":
        assert 200 in statuses
