"""What continuous batching promises: who asks when, and beside whom, changes no answer."""

from __future__ import annotations

import random
import resource
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from softrag.compressor import Compressor
from softrag.decoder import DecodeRequest, TorchDecoder, runner
from softrag.decoder.cache import PagePool
from softrag.fused import backbone
from tests.checkpoints import build_model
from tests.families import SENTENCES


@pytest.fixture(scope="module")
def model():
    return build_model("Qwen3")


@pytest.fixture(scope="module")
def requests(model):
    memories = Compressor(model).compress(SENTENCES)
    chance = random.Random(0)
    return [
        DecodeRequest(
            question=chance.choice(SENTENCES),
            documents=[
                chance.choice([memories[n], SENTENCES[n]])
                for n in chance.sample(range(len(SENTENCES)), chance.randrange(4))
            ],
            max_new_tokens=chance.randrange(1, 20),
        )
        for _ in range(20)
    ]


@pytest.fixture(scope="module")
def expected(model, requests):
    """Every request alone, by the model as Hugging Face wrote it."""
    decoder = TorchDecoder(model, fused=False)
    return [decoder.generate([request])[0].text for request in requests]


class Repeated:
    """Stands in for CUDA graphs: does all work twice, as capturing does."""

    def __init__(self, device):
        self.keys = set()

    def run(self, key, work):
        self.keys.add(key)
        work()
        return work()


def texts(results):
    return [result.text for result in results]


def test_a_batch_smaller_than_the_requests_gives_the_same_answers(model, requests, expected):
    for options in ({"batch_size": 1}, {"batch_size": 3}, {"batch_tokens": 50}):
        assert texts(TorchDecoder(model, **options).generate(requests)) == expected


def test_few_pages_make_requests_wait_and_are_all_given_back(model, requests, expected):
    decoder = TorchDecoder(model, cache_tokens=300)
    pool = decoder._engine._runner.pool

    assert texts(decoder.generate(requests)) == expected
    assert pool.free == pool.size == 10


def test_a_request_that_no_page_is_left_for_is_refused(model):
    decoder = TorchDecoder(model, cache_tokens=64)

    with pytest.raises(ValueError, match="keeps keys and values of 64"):
        decoder.generate([DecodeRequest(question="Why?", max_new_tokens=100)])


def test_rows_beside_prompts_are_padded_to_few_shapes():
    alone = {runner._bucket(rows, 100, mixed=False) for rows in range(101)}
    beside = {runner._bucket(rows, 100, mixed=True) for rows in range(101)}

    assert beside == {0, 4, 16, 64, 100}
    assert len(alone) == 14
    assert all(runner._bucket(rows, 100, mixed=True) >= rows for rows in range(101))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_compresses_and_answers_as_the_first_does():
    told = []
    for device in ("cuda:0", "cuda:1"):
        model = build_model("Qwen3").to(device=device, dtype=torch.bfloat16)
        memory = Compressor(model).compress(SENTENCES[:1])[0]
        request = DecodeRequest(question="Who?", documents=[memory], max_new_tokens=8)
        told.append((memory.values, TorchDecoder(model).generate([request])[0].text))

    assert torch.equal(told[0][0], told[1][0])
    assert told[0][1] == told[1][1]


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_passes_over_many_tokens_add_products_in_place_and_give_the_same_states(
    family, monkeypatch
):
    language_model = build_model(family).decoder
    embeddings = torch.randn(50, language_model.config.hidden_size)
    borders, positions = torch.tensor([0, 20, 50], dtype=torch.int32), torch.arange(50) % 30
    fused = backbone.FusedBackbone(language_model.base_model)

    def states():
        def attend(number, qkv):
            fused.rotate(number, qkv, positions)
            return fused.attend_packed(qkv, borders, 30)

        return fused.forward(embeddings, attend)

    before, few = embeddings.clone(), states()
    monkeypatch.setattr(backbone, "MANY_TOKENS", 50)
    many = states()

    torch.testing.assert_close(many.last, few.last, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(many.middle, few.middle, rtol=1e-4, atol=1e-5)
    assert torch.equal(embeddings, before)


@pytest.mark.parametrize(("ahead", "many"), [(False, 10**6), (True, 10**6), (True, 1)])
def test_padded_shapes_give_the_same_answers(model, requests, expected, ahead, many, monkeypatch):
    monkeypatch.setattr(backbone, "MANY_TOKENS", many)
    monkeypatch.setattr(runner, "GraphSet", Repeated)
    monkeypatch.setattr(runner, "can_capture", lambda dtype: True)
    decoder = TorchDecoder(model, capture=True, batch_size=7)
    # As on a GPU: a step starts before the tokens of the one before are read.
    decoder._engine._ahead = ahead

    assert texts(decoder.generate(requests)) == expected
    assert texts(decoder.generate([requests[3]])) == expected[3:4]
    sampled = [replace(request, temperature=2.0, seed=5) for request in requests]
    assert texts(decoder.generate(sampled)) == texts(TorchDecoder(model).generate(sampled))
    copied = [
        replace(request, copy_from=SENTENCES, copy_bias=100.0 * (number % 3 > 0))
        for number, request in enumerate(requests)
    ]
    assert texts(decoder.generate(copied)) == texts(TorchDecoder(model).generate(copied))
    assert texts(decoder.generate(copied)) != expected
    shapes = {(places, tokens) for places, tokens, *_ in decoder._engine._runner._graphs.keys}
    assert {places for places, _ in shapes} == {0, 1, 2, 4, 7}
    assert len(shapes) < 30


def test_callers_at_the_same_time_get_their_own_answers(model, requests, expected):
    decoder = TorchDecoder(model, batch_size=6)
    found = {}

    def ask(number):
        if number % 3:
            found[number] = decoder.generate([requests[number]])[0].text
        else:
            found[number] = "".join(decoder.stream(requests[number]))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert [found[number] for number in range(len(requests))] == expected


def test_a_request_joins_those_that_run(model, requests):
    decoder = TorchDecoder(model)
    steps = watch_steps(decoder)
    long = replace(requests[0], max_new_tokens=30)

    stream = decoder.stream(long)
    next(stream)
    decoder.generate([replace(requests[1], max_new_tokens=3)])

    # The second was read while the first was running, and left before it.
    assert (1, 1) in steps
    assert steps[-1] == (2, 0)
    stream.close()


def test_a_slow_reader_keeps_nobody_waiting(model, requests, expected):
    decoder = TorchDecoder(model)
    slow = decoder.stream(replace(requests[0], max_new_tokens=200))
    next(slow)

    assert texts(decoder.generate(requests[1:4])) == expected[1:4]
    slow.close()


def test_what_breaks_a_step_reaches_every_caller_and_the_next_one_works(
    model, requests, expected, monkeypatch
):
    decoder = TorchDecoder(model)
    stepper = decoder._engine._runner
    with monkeypatch.context() as broken:

        def fail(*new):
            raise RuntimeError("out of memory")

        stream = decoder.stream(requests[0])
        next(stream, None)
        broken.setattr(stepper, "step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            decoder.generate(requests[1:3])

    assert stepper.rows == 0
    assert texts(decoder.generate(requests)) == expected
    assert stepper.pool.free == stepper.pool.size


def test_sampled_tokens_follow_their_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20000, -1)
    seeds = torch.arange(20000)
    ones = torch.ones(20000)

    tokens = runner.choose(logits, ones, seeds, torch.full((20000,), 7))

    shares = torch.bincount(tokens, minlength=4) / 20000
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.01, rtol=0.0)


def watch_steps(decoder):
    """Return a list that fills with (running, new) rows of every step."""
    steps = []
    stepper = decoder._engine._runner
    step = stepper.step
    stepper.step = lambda new, *biases: (
        steps.append((stepper.rows, len(new))),
        step(new, *biases),
    )[1]
    return steps


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's figures")
def test_pages_that_are_not_used_cost_no_memory_on_a_cpu():
    before = resident_bytes()
    pool = PagePool(
        layers=8,
        kv_heads=4,
        head_dim=64,
        pages=4096,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )

    assert pool.nbytes > 2**30
    assert pool.keys.dtype == torch.bfloat16
    assert resident_bytes() - before < 2**27


def resident_bytes():
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()
