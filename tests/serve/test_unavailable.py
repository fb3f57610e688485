"""What clients are told when the decoder or the store behind the server is down."""

from __future__ import annotations

import json

import openai
import pytest

from softrag.errors import DecoderError
from tests.serve.conftest import ACME

ASKED = {"role": "user", "content": "Who wrote Hamlet and Macbeth?"}
CHAT = {"model": "tiny", "messages": [ASKED], "max_tokens": 8}


class MortalDecoder:
    """A decoder whose engine dies after some pieces of an answer, until it is back."""

    joins_requests = True
    copy_bias = 0.0

    def __init__(self, decoder, pieces):
        self.fingerprint = decoder.fingerprint
        self.prompt_tokens = decoder.prompt_tokens
        self.pieces = pieces
        self.is_back = False
        self._decoder = decoder

    def generate(self, requests):
        if self.is_back:
            return self._decoder.generate(requests)
        raise DecoderError("http://10.0.0.7:8000 is gone")

    def stream(self, request):
        stream = self._decoder.stream(request)
        if self.is_back:
            return (yield from stream)
        for _ in range(self.pieces):
            yield next(stream)
        raise DecoderError("http://10.0.0.7:8000 is gone")

    def close(self):
        self._decoder.close()


def mortal(served, pieces):
    engine = served.engines["acme"]
    engine.decoder = MortalDecoder(engine.decoder, pieces)
    return engine.decoder


@pytest.mark.parametrize("stream", [False, True])
def test_a_decoder_that_is_down_is_a_503_until_it_is_back(own_server, stream):
    decoder = mortal(own_server, pieces=0)
    with own_server.client() as client:
        down = client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
        decoder.is_back = True
        back = client.post("/v1/chat/completions", json={**CHAT, "stream": stream})

    assert down.status_code == 503
    error = down.json()["error"]
    assert (error["code"], error["type"]) == ("unavailable", "server_error")
    assert "decoder" in error["message"]
    # Where it runs is nobody's business.
    assert "10.0.0.7" not in down.text
    assert down.headers["retry-after"] == "5"
    assert back.status_code == 200


def test_a_decoder_that_dies_in_the_middle_ends_the_stream_with_an_error(own_server):
    mortal(own_server, pieces=2)
    with own_server.client() as client:
        text = client.post("/v1/chat/completions", json={**CHAT, "stream": True}).text

    *_, last, end = text.split("\n\n")
    assert end == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"


def test_the_official_client_raises_it(own_server):
    mortal(own_server, pieces=2)
    with openai.OpenAI(base_url=f"{own_server.address}/v1", api_key=ACME) as client:
        stream = client.chat.completions.create(**CHAT, stream=True)
        with pytest.raises(openai.APIError, match="decoder behind this server"):
            list(stream)


def test_a_store_that_is_down_is_a_503(own_server):
    own_server.engines["acme"].store.close()
    with own_server.client() as client:
        replies = [
            client.post("/v1/chat/completions", json=CHAT),
            client.post("/v1/retrieve", json={"query": "x"}),
            client.post("/v1/documents", json={"documents": [{"text": "x"}]}),
            client.delete("/v1/documents?id=x"),
        ]

    for reply in replies:
        assert reply.status_code == 503
        assert "store behind this server" in reply.json()["error"]["message"]
