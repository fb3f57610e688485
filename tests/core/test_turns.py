"""What holds for callers that share an engine: one that fails, or reads at any time, harms none."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from softrag.decoder import DecodeRequest, TorchDecoder
from softrag.decoder.detokenizer import Detokenizer
from softrag.decoder.row import Row
from softrag.prompt import PromptRow
from tests.checkpoints import build_model
from tests.families import build_tokenizer

REQUEST = DecodeRequest(question="Why?", max_new_tokens=5)


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(params=[True, False], ids=["fused", "eager"])
def decoder(model, request):
    return TorchDecoder(model, batch_size=2, fused=request.param)


@pytest.fixture
def threads():
    with ThreadPoolExecutor(3) as threads:
        yield threads


def before_prompts(decoder, monkeypatch, *before):
    """Call one of `before` in every step that reads prompts; the step breaks when it raises."""
    engine, calls = decoder._engine, iter(before)
    where, name = (engine, "_prefill") if hasattr(engine, "_prefill") else (engine._runner, "step")
    work = getattr(where, name)

    def step(prompts, *biases):
        if prompts:
            next(calls, lambda: None)()
        return work(prompts, *biases)

    monkeypatch.setattr(where, name, step)


def fail():
    raise RuntimeError("out of memory")


def wait_for_callers(decoder, count):
    """Wait until `count` callers wait for their turn."""
    while len(decoder._engine._turns._idle) < count:
        time.sleep(0.001)


def test_who_waits_while_a_step_breaks_gets_the_turn(decoder, threads, monkeypatch):
    expected = decoder.generate([REQUEST])[0].text
    others = []

    def come_and_fail():
        others.append(threads.submit(decoder.generate, [REQUEST]))
        wait_for_callers(decoder, 1)
        fail()

    before_prompts(decoder, monkeypatch, come_and_fail)

    with pytest.raises(RuntimeError, match="out of memory"):
        decoder.generate([REQUEST])
    assert others[0].result(60)[0].text == expected


def test_a_first_step_that_breaks_reaches_everybody_in_it(decoder, threads, monkeypatch):
    expected = decoder.generate([REQUEST])[0].text
    others = []

    def come():
        others.extend(threads.submit(decoder.generate, [REQUEST]) for _ in range(2))
        wait_for_callers(decoder, 2)

    # Both places of the batch are taken: the two others wait, and begin together.
    before_prompts(decoder, monkeypatch, come, fail)
    first = decoder.generate([REQUEST] * 2)

    assert [result.text for result in first] == [expected] * 2
    assert [str(other.exception(60)) for other in others] == ["out of memory"] * 2
    assert decoder.generate([REQUEST])[0].text == expected


class Watched(Detokenizer):
    """Lets a reader look at the row while a token is put in words, as another thread may."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.read = lambda: None

    def _decode(self):
        self.read()
        return super()._decode()


@pytest.mark.parametrize("streamed", [True, False])
def test_a_row_may_be_read_while_a_token_is_put_in_words(streamed):
    tokenizer = build_tokenizer("Llama")
    ids = tokenizer.encode("The river flows to the sea.", add_special_tokens=False)
    detokenizer, texts = Watched(tokenizer), []
    request = DecodeRequest(question="Where to?", max_new_tokens=len(ids))
    row = Row(request, PromptRow([], 0), detokenizer, streamed=streamed)

    def read():
        assert not row.done  # whoever finds it done takes what is there for the whole answer
        texts.append(row.take_delta())

    detokenizer.read = read
    for token in ids:
        row.push(token, 0.0, set())

    assert "".join([*texts, row.take_delta()]) == row.result().text == tokenizer.decode(ids)
