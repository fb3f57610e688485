"""Real vLLM on the CPU: the same answers as the decoder in this process, and no harm done.

In float32, where greedy answers must be equal to the token.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from softrag import MemoryMismatchError, NonFiniteMemoryError, VLLMDecoder
from softrag.decoder.vllm_plugin import content_hash
from softrag.errors import DecoderError

# Warnings of vLLM's own imports in the test that runs it in this process.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def open_decoder():
    """Return a function that opens decoders, which are closed in the end."""
    opened = []

    def open_url(url, **options):
        opened.append(VLLMDecoder.from_url("softrag-demo", url, **options))
        return opened[-1]

    yield open_url
    for decoder in opened:
        decoder.close()


def answers(results):
    return [(r.text, r.completion_tokens, r.prompt_tokens, r.finish_reason) for r in results]


def test_a_server_gives_the_answers_of_the_decoder_in_process(
    server, open_decoder, requests, expected
):
    results = open_decoder(server.url).generate(requests)

    assert answers(results) == answers(expected)
    for result, other in zip(results, expected, strict=True):
        assert result.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-3)


def test_the_plugin_gives_the_same_answers_from_memories_and_from_their_hashes(
    plugin_server, open_decoder, requests, expected
):
    decoder = open_decoder(plugin_server.url, send_once=True)

    assert answers(decoder.generate(requests)) == answers(expected)
    assert answers(decoder.generate(requests)) == answers(expected)


def test_vllm_in_this_process_gives_the_same_answers(exported, requests, expected):
    options = {"enforce_eager": True, "dtype": "float32"}
    decoder = VLLMDecoder.in_process("softrag-demo", exported=exported, options=options)
    try:
        assert answers(decoder.generate(requests)) == answers(expected)
        assert "".join(decoder.stream(requests[0])) == expected[0].text
    finally:
        decoder.close()


def test_streams_and_stop_strings_are_those_of_the_decoder_in_process(
    server, open_decoder, in_process, requests
):
    decoder = open_decoder(server.url)
    for request in (requests[1], replace(requests[1], stop=["Aug"])):
        expected = in_process.generate([request])[0]

        assert "".join(decoder.stream(request)) == expected.text
        assert answers(decoder.generate([request])) == answers([expected])


def test_a_memory_twice_in_a_prompt_and_texts_beside_memories(
    plugin_server, open_decoder, in_process, requests
):
    memory = requests[5].documents[0]
    request = replace(requests[5], documents=[memory, "Paris is in France.", memory])

    decoder = open_decoder(plugin_server.url, send_once=True)

    assert answers(decoder.generate([request])) == answers(in_process.generate([request]))


def test_hashes_that_the_server_never_saw_are_followed_by_the_memories(
    plugin_server, open_decoder, requests, expected
):
    decoder = open_decoder(plugin_server.url, send_once=True)
    unseen = [
        replace(memory, values=memory.values.float() + 1e-6) for memory in requests[7].documents
    ]
    decoder.engine._remember(list(map(content_hash, unseen)))

    results = decoder.generate([replace(requests[7], documents=unseen), requests[8]])

    assert answers(results) == answers(expected[7:9])


def spoilt(memory):
    """Return every memory that must not be read, with its error."""
    nan, infinite = memory.values.clone(), memory.values.clone()
    nan[0, 0], infinite[0, 0] = float("nan"), float("inf")
    return [
        (replace(memory, values=nan), NonFiniteMemoryError),
        (replace(memory, values=infinite), NonFiniteMemoryError),
        (replace(memory, values=memory.values[:, 1:]), MemoryMismatchError),
        (replace(memory, fingerprint="0" * 32), MemoryMismatchError),
    ]


def test_spoilt_memories_never_arrive_and_a_thousand_further_answers_are_right(
    server, open_decoder, in_process, requests
):
    decoder = open_decoder(server.url)
    served = server.log().count("POST /v1/completions")
    for memory, error in spoilt(requests[0].documents[0]):
        with pytest.raises(error):
            decoder.generate([replace(requests[0], documents=[memory])])
    assert server.log().count("POST /v1/completions") == served
    big = torch.zeros(20_000, requests[0].documents[0].values.shape[1], dtype=torch.bfloat16)
    length = len(requests[0].documents[0])
    big[:length] = requests[0].documents[0].values
    view = replace(requests[0].documents[0], values=big[:length])
    assert (
        decoder.generate([replace(requests[0], documents=[view])])[0].text
        == decoder.generate([replace(requests[0], documents=requests[0].documents[:1])])[0].text
    )

    short = [replace(each, max_new_tokens=2) for each in requests]
    right = answers(in_process.generate(short))
    assert answers(decoder.generate(short * 20)) == right * 20


def test_a_server_without_prompt_embeddings_is_told_what_it_lacks(
    plugin_server, open_decoder, requests
):
    with pytest.raises(DecoderError, match="Start it with --enable-prompt-embeds"):
        open_decoder(plugin_server.url).generate(requests[:1])


def test_a_server_killed_in_an_answer_is_an_error_and_found_when_it_is_back(
    server, open_decoder, requests, expected
):
    decoder, endless = open_decoder(server.url), open_decoder(server.url)
    endless._end_ids = []
    stream = endless.stream(replace(requests[0], max_new_tokens=2000))
    next(stream)
    server.kill()

    with pytest.raises(DecoderError, match="broke off in the middle"):
        for _ in stream:
            pass
    with pytest.raises(DecoderError, match="No answer from the vLLM server"):
        decoder.generate(requests[:4])

    server.start()
    assert answers(decoder.generate(requests[:4])) == answers(expected[:4])
