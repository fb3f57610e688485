"""What the client of a vLLM server promises, against a stub that speaks the server's protocol.

`tests/vllm` asks the same of a real server.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from softrag import SoftRAG
from softrag.cli import app
from softrag.compressor import Compressor
from softrag.decoder import DecodeRequest, TorchDecoder, VLLMDecoder
from softrag.decoder.prompts import PromptBuilder
from softrag.errors import (
    CheckpointError,
    DecoderError,
    MemoryMismatchError,
    NonFiniteMemoryError,
)
from softrag.export import served_name
from softrag.model import SoftRAGModel
from tests.checkpoints import build_checkpoint, build_model
from tests.core.decode_requests import asks, drain
from tests.core.vllm_stub import VLLMStub
from tests.embedders import HashingEmbedder
from tests.families import SENTENCES, build_family


@pytest.fixture(scope="module")
def model():
    return SoftRAGModel.from_pretrained(build_checkpoint(), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def in_process(model):
    return TorchDecoder(model)


@pytest.fixture(scope="module")
def memories(model):
    return Compressor(model).compress(SENTENCES)


@pytest.fixture
def server(in_process):
    stub = VLLMStub(in_process.model)
    yield stub
    stub.close()


@pytest.fixture
def decoder(server):
    decoder = VLLMDecoder.from_url(build_checkpoint(), server.url, retries=1, timeout_s=20)
    yield decoder
    decoder.close()


def test_a_copy_bias_is_refused_before_anything_is_sent(server, decoder):
    request = DecodeRequest(question="Why?", copy_from=["Because."], copy_bias=4.0)

    with pytest.raises(ValueError, match=r"found copy_bias 4\.0\. Set it to 0, or answer with"):
        decoder.generate([request])
    with pytest.raises(ValueError, match="copy_bias"):
        next(decoder.stream(request))
    assert not server.requests
    # Models that are best with one are asked without.
    assert decoder.copy_bias == 0.0


def wait_for_running(server, requests):
    deadline = time.monotonic() + 20
    while server.running < requests and time.monotonic() < deadline:
        time.sleep(0.005)


def plain(result):
    """Return what must not depend on the engine."""
    return (
        result.text,
        result.prompt_tokens,
        result.soft_tokens,
        result.completion_tokens,
        result.finish_reason,
    )


def test_answers_are_those_of_the_decoder_in_process(decoder, in_process, memories):
    requests = asks(memories)

    results = decoder.generate(requests)

    expected = in_process.generate(requests)
    assert list(map(plain, results)) == list(map(plain, expected))
    for result, other in zip(results, expected, strict=True):
        assert result.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-3)
        assert result.first_token_s > 0


def test_every_family_is_embedded_as_its_decoder_does(tiny_family: Path, tmp_path: Path):
    model = build_model(tiny_family)
    model.save_pretrained(tmp_path)
    memories = Compressor(model).compress(SENTENCES[:2])
    prompts = PromptBuilder.from_pretrained(tmp_path)

    built = prompts.build("Why <MEM>?", [memories[0], "A text.", memories[1]])
    embedded = prompts.load_embeddings().embed(built)

    ids = torch.tensor([built.input_ids])
    soft_tokens = torch.cat([memory.values for memory in memories])
    expected = model.embed_prompt(ids, torch.ones_like(ids), soft_tokens)[0]
    assert built.soft_tokens == len(soft_tokens)
    assert torch.equal(embedded, expected)


def test_a_stream_is_the_answer_in_pieces(decoder, memories):
    for request in asks(memories):
        pieces, result = drain(decoder.stream(request))

        assert "".join(pieces) == result.text == decoder.generate([request])[0].text
        assert all(pieces)


def test_a_stop_string_ends_the_answer_before_it(decoder, in_process, memories):
    request = DecodeRequest(question="Who wrote Hamlet?", documents=memories[:3], max_new_tokens=30)
    whole = decoder.generate([request])[0].text
    middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
    stopping = replace(request, stop=["never said", middle])

    result = decoder.generate([stopping])[0]

    assert result.text == whole[: whole.index(middle)]
    assert plain(result) == plain(in_process.generate([stopping])[0])


def test_the_models_own_end_is_no_text(decoder, server, in_process, memories, monkeypatch):
    request = DecodeRequest(question="Why?", documents=memories[:1], max_new_tokens=20)
    decoder.generate([request])
    third = server.written[2]
    monkeypatch.setattr(decoder, "_end_ids", [third])
    monkeypatch.setattr(in_process._engine, "_end_ids", {third})

    result = decoder.generate([request])[0]

    assert result.finish_reason == "stop"
    assert result.completion_tokens <= 3
    assert plain(result) == plain(in_process.generate([request])[0])


def test_sampling_is_said_in_full_in_numbers_that_travel(decoder, server, memories):
    request = DecodeRequest(
        question="Why?", documents=memories[:1], temperature=np.float32(0.5), seed=np.int64(3)
    )
    decoder.generate([replace(request, max_new_tokens=np.int64(2), stop=["."])])

    sent = server.requests[-1]
    assert {name: sent[name] for name in ("temperature", "seed", "max_tokens", "stop")} == {
        "temperature": 0.5,
        "seed": 3,
        "max_tokens": 2,
        "stop": ["."],
    }
    # Whatever the exported model's generation config says.
    assert (sent["top_p"], sent["top_k"], sent["min_p"], sent["repetition_penalty"]) == (1, 0, 0, 1)
    assert sent["ignore_eos"]
    assert sent["stop_token_ids"] == sorted(decoder.prompts.prompt.end_ids)


def test_what_is_sent_holds_the_prompt_and_nothing_else(decoder, server, memories):
    # A memory that looks into a tensor of a megabyte.
    big = torch.zeros(8192, memories[0].values.shape[1], dtype=torch.bfloat16)
    big[: len(memories[0])] = memories[0].values
    view = replace(memories[0], values=big[: len(memories[0])])
    request = DecodeRequest(question="Why?", documents=[view], max_new_tokens=2)

    decoder.generate([request])

    embeds, payload = server.embeds[-1], server.payloads[-1]
    assert embeds.untyped_storage().nbytes() == embeds.nbytes
    assert len(payload) < embeds.nbytes + 2000
    assert len(embeds) == decoder.prompt_tokens("Why?", [view])


def test_the_stable_text_comes_first_and_the_question_last(decoder, memories):
    lay_out = decoder.prompts.lay_out
    first = lay_out("Who?", memories[:2]).input_ids
    second = lay_out("What is the name of the author?", memories[:2]).input_ids
    memory_id = decoder.prompts.prompt.memory_id

    shared = next(n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)

    assert shared > len(first) - first[::-1].index(memory_id) - 1


def test_in_canonical_order_the_same_documents_are_the_same_prompt(memories):
    ranked = PromptBuilder.from_pretrained(build_checkpoint())
    canonical = PromptBuilder.from_pretrained(build_checkpoint(), canonical_order=True)
    there, back = memories[:3], memories[2::-1]

    assert canonical.build("Why?", there).memories == canonical.build("Why?", back).memories
    assert ranked.build("Why?", there).memories == there
    assert ranked.build("Why?", back).memories == back


def spoilt(memory, how):
    values = memory.values.clone()
    if how in ("nan", "inf"):
        values[0, 0] = float(how)
        return replace(memory, values=values)
    return {
        "foreign": lambda: replace(memory, fingerprint="0" * 32),
        "narrow": lambda: replace(memory, values=values[:, 1:]),
        "flat": lambda: replace(memory, values=values[0]),
        "empty": lambda: replace(memory, values=values[:0]),
        "integer": lambda: replace(memory, values=values.int()),
    }[how]()


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("nan", NonFiniteMemoryError),
        ("inf", NonFiniteMemoryError),
        ("foreign", MemoryMismatchError),
        ("narrow", MemoryMismatchError),
        ("flat", MemoryMismatchError),
        ("empty", MemoryMismatchError),
        ("integer", MemoryMismatchError),
    ],
)
def test_a_memory_that_must_not_be_read_never_leaves(decoder, server, memories, how, error):
    good, bad = asks(memories)[0], spoilt(memories[0], how)

    with pytest.raises(error, match="Compress"):
        decoder.generate([good, DecodeRequest(question="Why?", documents=[bad])])
    with pytest.raises(error):
        next(decoder.stream(DecodeRequest(question="Why?", documents=[bad])))

    # Not even the request in good order that came with it.
    assert server.requests == []


def test_a_prompt_longer_than_the_server_reads_is_refused(decoder, server):
    with pytest.raises(ValueError, match="the decoder reads 2048"):
        decoder.generate([DecodeRequest(question="Why?", documents=["word " * 3000])])
    assert server.requests == []


def test_many_callers_get_their_own_answers_and_no_more_run_than_allowed(
    server, in_process, memories
):
    requests = [
        DecodeRequest(question=f"What is {n}?", documents=[memories[n % 8]], max_new_tokens=4)
        for n in range(40)
    ]
    expected = [result.text for result in in_process.generate(requests)]
    decoder = VLLMDecoder.from_url(build_checkpoint(), server.url, max_concurrent=5)

    server.gate.clear()
    with ThreadPoolExecutor(20) as callers:
        streams = callers.map(lambda r: drain(decoder.stream(r))[1].text, requests[:20])
        batch = callers.submit(decoder.generate, requests[20:])
        wait_for_running(server, 5)
        server.gate.set()
        answers = [*streams, *(result.text for result in batch.result())]

    decoder.close()
    assert answers == expected
    assert server.most_running == 5


def test_characters_that_end_lines_elsewhere_end_no_message(decoder, server, in_process, memories):
    server.text = "\u2028 \x85"

    results = decoder.generate(asks(memories)[:1])

    assert plain(results[0]) == plain(in_process.generate(asks(memories)[:1])[0])


def test_a_connection_is_opened_once_for_many_answers(decoder, server, memories):
    for request in asks(memories):
        decoder.generate([request])
    assert len(server.requests) == 4
    assert server.connections == 1


def test_closing_a_stream_stops_the_server(decoder, server, memories):
    stream = decoder.stream(replace(asks(memories)[0], max_new_tokens=1500))
    next(stream)
    stream.close()

    assert server.aborted.wait(20)
    with pytest.raises(StopIteration):
        next(stream)


def test_a_busy_server_is_asked_again_a_bounded_number_of_times(decoder, server, memories):
    request = asks(memories)[2]
    expected = decoder.generate([request])[0].text

    server.failures = [503]
    assert decoder.generate([request])[0].text == expected

    server.failures = [429] * 2
    with pytest.raises(DecoderError, match=r"after 2 attempts \(429: refused by the test\)"):
        decoder.generate([request])
    assert server.failures == []


def test_an_answer_that_breaks_off_is_an_error_and_the_next_one_works(decoder, server, memories):
    request = replace(asks(memories)[0], max_new_tokens=30)
    server.breaks_after = 4

    stream = decoder.stream(request)
    with pytest.raises(DecoderError, match="broke off in the middle of an answer"):
        drain(stream)
    assert len(server.requests) == 1  # what was given out cannot be taken back by asking again

    server.breaks_after = None
    assert decoder.generate([request])[0].completion_tokens == 30


def test_a_server_that_is_away_is_an_error_and_found_when_it_is_back(
    decoder, server, in_process, memories
):
    request = asks(memories)[2]
    expected = decoder.generate([request])[0].text
    server.close()

    for requests in ([request], [request] * 3):
        with pytest.raises(DecoderError, match="No answer from the vLLM server at http"):
            decoder.generate(requests)

    back = VLLMStub(in_process.model, port=server.port)
    try:
        assert decoder.generate([request])[0].text == expected
    finally:
        back.close()


def test_a_silent_server_is_an_error(server, memories):
    decoder = VLLMDecoder.from_url(build_checkpoint(), server.url, timeout_s=0.2)
    server.gate.clear()

    with pytest.raises(DecoderError, match=r"silent for 0.2 s"):
        decoder.generate(asks(memories)[:1])

    server.gate.set()
    decoder.close()


def refusal(decoder):
    with pytest.raises(DecoderError) as caught:
        decoder.generate([DecodeRequest(question="Why?", max_new_tokens=2)])
    return str(caught.value)


def test_refusals_say_what_to_do(server, decoder):
    server.prompt_embeds = False
    assert "Start it with --enable-prompt-embeds" in refusal(decoder)
    server.prompt_embeds = True

    server.model = TorchDecoder(build_model(build_family("Llama", hidden_size=64))).model
    assert "serves another model than the checkpoint's decoder" in refusal(decoder)

    server.failures = [500]
    assert "See its log" in refusal(decoder)
    server.failures = [413]
    assert "Ask with fewer documents" in refusal(decoder)


def test_the_served_model_is_found_or_named(server, memories):
    request = DecodeRequest(question="Why?", max_new_tokens=2)

    def ask(**options):
        decoder = VLLMDecoder.from_url(build_checkpoint(), server.url, retries=0, **options)
        try:
            return decoder.generate([request])[0].completion_tokens
        finally:
            decoder.close()

    assert ask() == 2
    with pytest.raises(DecoderError, match="serves 'exported', but no model 'mine'"):
        ask(model="mine")
    server.models = ["exported", "other"]
    with pytest.raises(DecoderError, match="serves 'exported', 'other'; say which"):
        ask()
    assert ask(model="other") == 2
    server.key = "secret"
    with pytest.raises(DecoderError, match="Give the key it was started with"):
        ask(model="other")
    assert ask(model="other", api_key="secret") == 2


def test_a_server_of_another_checkpoints_decoder_is_noticed(server, decoder):
    server.models = [served_name(build_checkpoint(seed=1))]
    assert "serves 'softrag-decoder-" in refusal(decoder)
    assert server.requests == []

    server.models.append(served_name(build_checkpoint()))
    decoder.generate([DecodeRequest(question="Why?", max_new_tokens=2)])
    assert server.requests[0]["model"] == server.models[1] != server.models[0]


def test_what_is_no_vllm_server_is_said():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        decoder = VLLMDecoder.from_url(build_checkpoint(), url, retries=0)
        assert "Start it, check the URL" in refusal(decoder)
    decoder.close()
    with pytest.raises(ValueError, match="must start with http"):
        VLLMDecoder.from_url(build_checkpoint(), "localhost:8000")
    with pytest.raises(ValueError, match="expected 'torch', 'vllm' or the URL"):
        VLLMDecoder.open("cuda", build_checkpoint())


def test_a_checkpoint_without_a_fingerprint_is_refused(tmp_path: Path):
    build_model().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fingerprint": None}))

    with pytest.raises(CheckpointError, match="has no fingerprint"):
        PromptBuilder.from_pretrained(tmp_path)


def test_the_engine_answers_through_a_server(server):
    local = SoftRAG.from_pretrained(build_checkpoint(), embedder=HashingEmbedder(), device="cpu")
    remote = SoftRAG.from_pretrained(
        build_checkpoint(), embedder=HashingEmbedder(), device="cpu", decoder=server.url
    )
    with local, remote:
        for engine in (local, remote):
            engine.add(SENTENCES)
        assert remote.compressor.model.decoder is None  # its layers are the server's

        expected = local.ask("Who wrote Hamlet?", k=2, max_new_tokens=9)
        answer = remote.ask("Who wrote Hamlet?", k=2, max_new_tokens=9)
        stream = remote.stream("Who wrote Hamlet?", k=2, max_new_tokens=9)

        assert answer.text == expected.text == "".join(stream)
        assert answer.usage == expected.usage
        assert [hit.id for hit in answer.sources] == [hit.id for hit in expected.sources]


def test_a_long_answer_does_not_hold_up_a_short_one(server, memories):
    # A batch of its own each: what one caller waits for is no other caller's business.
    engine = SoftRAG.from_pretrained(
        build_checkpoint(), embedder=HashingEmbedder(), device="cpu", decoder=server.url
    )
    with engine, ThreadPoolExecutor(1) as other:
        server.gate.clear()
        long = other.submit(engine.answer_from, "Why?", [memories[0]], max_new_tokens=5)
        wait_for_running(server, 1)
        waiting = threading.Thread(target=engine.answer_from, args=("Who?", [memories[1]]))
        waiting.start()
        wait_for_running(server, 2)
        running = server.running
        server.gate.set()
        waiting.join()

        assert running == 2
        assert long.result().usage.completion_tokens == 5


@pytest.fixture
def sender(server):
    decoder = VLLMDecoder.from_url(build_checkpoint(), server.url, retries=0, send_once=True)
    yield decoder
    decoder.close()


def sent(request):
    """Return which memories of a request travelled whole."""
    return [data is not None for data in request["features"]["kwargs_data"]["image"]]


def test_memories_are_sent_once_and_named_afterwards(sender, server, in_process, memories):
    requests = asks(memories)
    expected = list(map(plain, in_process.generate(requests)))

    first = [sender.generate([request])[0] for request in requests]
    again = [sender.generate([request])[0] for request in requests]

    assert list(map(plain, first)) == list(map(plain, again)) == expected
    assert again[0].token_logprobs == pytest.approx(
        in_process.generate(requests[:1])[0].token_logprobs, abs=1e-3
    )
    with_memories = [request for request in server.requests if "features" in request]
    assert [sent(request) for request in with_memories] == [
        [True, True, True],
        [False],  # the second document of the first question
        [True],
        [False, False, False],
        [False],
        [False],
    ]
    first_bytes, later_bytes = (len(json.dumps(with_memories[place])) for place in (0, 3))
    assert later_bytes < first_bytes - sum(memory.nbytes for memory in memories[:3])


def test_what_the_server_forgot_is_sent_again(sender, server, memories):
    request = asks(memories)[0]
    expected = sender.generate([request])[0].text
    server.memories.clear()

    assert sender.generate([request])[0].text == expected
    assert [sent(each) for each in server.requests[1:]] == [[False] * 3, [True] * 3]
    # A refusal that has nothing to do with memories stays one.
    server.failures = [400, 400]
    with pytest.raises(DecoderError, match="refused by the test"):
        sender.generate([request])


def test_a_memory_twice_in_a_prompt_is_sent_once(sender, server, in_process, memories):
    request = DecodeRequest(question="Why?", documents=[memories[0], memories[0]], max_new_tokens=5)

    result = sender.generate([request])[0]

    assert plain(result) == plain(in_process.generate([request])[0])
    assert sent(server.requests[0]) == [True, False]


def test_other_values_of_the_same_document_have_another_hash(sender, server, memories):
    request = asks(memories)[1]
    rounded = replace(memories[1], values=memories[1].values.float() * 1.01)

    sender.generate([request])
    sender.generate([replace(request, documents=[rounded])])

    assert [sent(each) for each in server.requests] == [[True], [True]]


def test_the_command_exports_the_decoder_and_asks_a_server(
    server, in_process, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("softrag.engine.default_embedder", HashingEmbedder)
    environment = {
        "SOFTRAG_MODEL": str(build_checkpoint()),
        "SOFTRAG_STORE": str(tmp_path / "store"),
        "VLLM_API_KEY": "secret",
    }

    def run(*arguments):
        result = CliRunner().invoke(app, list(map(str, arguments)), env=environment)
        assert result.exit_code == 0, result.output
        return result.stdout

    shown = json.loads(run("export", tmp_path / "decoder", "--dtype", "float32", "--json"))
    exported = AutoModelForCausalLM.from_pretrained(shown["folder"], dtype="auto")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(exported(ids).logits, in_process.model.decoder(ids).logits)
    assert shown["command"] == (
        f"vllm serve {shown['folder']} --served-model-name {served_name(build_checkpoint())} "
        "--enable-prompt-embeds"
    )
    assert "vllm serve" in run("export", tmp_path / "decoder")

    (tmp_path / "note.txt").write_text(SENTENCES[2])
    run("index", tmp_path / "note.txt")
    server.key = "secret"
    ask = ("ask", "Who wrote Hamlet?", "--max-new-tokens", 5, "--json")
    remote = json.loads(run(*ask, "--decoder", server.url))

    assert remote["answer"] == json.loads(run(*ask))["answer"]
    assert len(server.requests) == 1
