"""What decoders promise: the same answer in a batch, alone and streamed, and only real memories."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from softrag.compressor import Compressor
from softrag.decoder import DecodeRequest, TorchDecoder
from softrag.decoder.detokenizer import Detokenizer
from softrag.errors import MemoryMismatchError, NonFiniteMemoryError
from tests.checkpoints import build_model
from tests.core.decode_requests import asks, drain
from tests.families import SENTENCES, build_tokenizer


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def decoder(model):
    return TorchDecoder(model)


@pytest.fixture(scope="module")
def memories(model):
    return Compressor(model).compress(SENTENCES)


def test_every_family_answers_the_same_in_a_batch_and_alone_and_as_hugging_face(tiny_family: Path):
    model = build_model(tiny_family)
    memories = Compressor(model).compress(SENTENCES)
    decoder = TorchDecoder(model)
    requests = asks(memories)

    together = decoder.generate(requests)
    alone = [decoder.generate([request])[0] for request in requests]

    assert [result.text for result in together] == [result.text for result in alone]
    assert [result.completion_tokens for result in together] == [
        result.completion_tokens for result in alone
    ]
    row = decoder.prompt.render(requests[0].question, [len(m) for m in memories[:3]])
    ids = torch.tensor([row.input_ids])
    mask = torch.ones_like(ids)
    soft_tokens = torch.cat([memory.values for memory in memories[:3]]).float()
    expected = model.decoder.generate(
        inputs_embeds=model.embed_prompt(ids, mask, soft_tokens),
        attention_mask=mask,
        max_new_tokens=requests[0].max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(decoder.prompt.end_ids),
        pad_token_id=0,
    )
    text = model.decoder_tokenizer.decode(expected[0], skip_special_tokens=True)
    assert together[0].text == text


def test_results_say_how_sure_the_model_was_of_every_token(model, decoder, memories):
    request = asks(memories)[0]

    result = decoder.generate([request])[0]
    sampled = decoder.generate([replace(request, temperature=5.0, seed=1)])[0]

    row = decoder.prompt.render(request.question, [len(m) for m in memories[:3]])
    ids = torch.tensor([row.input_ids])
    mask = torch.ones_like(ids)
    soft_tokens = torch.cat([memory.values for memory in memories[:3]]).float()
    with torch.no_grad():
        read = model.decoder(
            inputs_embeds=model.embed_prompt(ids, mask, soft_tokens),
            attention_mask=mask,
            output_hidden_states=True,
        )
    likeliest = read.logits[0, -1].log_softmax(-1).max()
    assert len(result.token_logprobs) == result.completion_tokens
    assert result.token_logprobs[0] == pytest.approx(likeliest.item(), abs=1e-4)
    # What is sampled is judged at temperature 1 too, so that answers stay comparable.
    assert sampled.token_logprobs[0] <= result.token_logprobs[0]
    assert len(sampled.token_logprobs) == sampled.completion_tokens
    # The state is for those who ask, and no neighbour in the batch moves it.
    assert result.prompt_state is None
    stateful = decoder.generate([*asks(memories)[1:], replace(request, with_state=True)])
    assert [each.prompt_state is None for each in stateful] == [True, True, True, False]
    torch.testing.assert_close(
        stateful[-1].prompt_state, read.hidden_states[1][0, -1], atol=1e-4, rtol=1e-4
    )


def test_small_batches_give_the_same_answers(model, decoder, memories):
    requests = asks(memories)
    expected = [result.text for result in decoder.generate(requests)]

    for limits in ({"batch_size": 1}, {"batch_size": 3}, {"batch_tokens": 100}):
        small = TorchDecoder(model, **limits)
        assert [result.text for result in small.generate(requests)] == expected


def test_a_stream_is_the_answer_in_pieces(decoder, memories):
    for request in asks(memories):
        pieces, result = drain(decoder.stream(request))

        assert "".join(pieces) == result.text == decoder.generate([request])[0].text
        assert all(pieces)


def test_closing_a_stream_stops_the_model(model, decoder, memories, monkeypatch):
    steps = []
    runner = decoder._engine._runner
    step = runner.step
    monkeypatch.setattr(runner, "step", lambda *new: (steps.append(1), step(*new))[1])

    stream = decoder.stream(
        DecodeRequest(question="Why?", documents=memories[:1], max_new_tokens=100)
    )
    next(stream)
    before = len(steps)
    stream.close()

    assert len(steps) == before < 20
    with pytest.raises(StopIteration):
        next(stream)


def test_usage_counts_soft_tokens_in_the_prompt(decoder, memories):
    request = DecodeRequest(question="Who?", documents=memories[:2], max_new_tokens=3)

    result = decoder.generate([request])[0]

    closed = decoder.prompt_tokens("Who?", [])
    assert result.soft_tokens == len(memories[0]) + len(memories[1])
    assert result.prompt_tokens == decoder.prompt_tokens("Who?", memories[:2])
    assert result.prompt_tokens > closed
    assert result.prompt_tokens < decoder.prompt_tokens("Who?", SENTENCES[:2])
    assert 1 <= result.completion_tokens <= 3
    assert result.first_token_s > 0


def test_a_stop_string_ends_the_answer_before_it(decoder, memories):
    request = DecodeRequest(question="Who wrote Hamlet?", documents=memories[:3], max_new_tokens=30)
    whole = decoder.generate([request])[0].text
    middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
    stopping = replace(request, stop=["never said", middle])

    result = decoder.generate([stopping])[0]
    pieces, streamed = drain(decoder.stream(stopping))

    assert result.text == whole[: whole.index(middle)]
    assert result.finish_reason == "stop"
    assert "".join(pieces) == result.text == streamed.text


def test_the_models_own_end_is_no_text(decoder, memories, monkeypatch):
    request = DecodeRequest(question="Why?", documents=memories[:1], max_new_tokens=20)
    whole = decoder.generate([request])[0]
    row = decoder._row(request)
    decoder._engine.finish([row])
    third = row._detokenizer._ids[2]
    monkeypatch.setattr(decoder._engine, "_end_ids", {third})

    result = decoder.generate([request])[0]

    assert whole.finish_reason == "length"
    assert result.finish_reason == "stop"
    assert result.completion_tokens <= 3
    # These tokens are bytes: the end may come within a character.
    assert whole.text.startswith(result.text.rstrip("\ufffd"))


def test_sampling_repeats_with_its_seed_whatever_the_batch(decoder, memories):
    request = DecodeRequest(
        question="Why?", documents=memories[:1], max_new_tokens=12, temperature=1.5, seed=7
    )

    alone = decoder.generate([request])[0].text
    among = decoder.generate([*asks(memories), request, replace(request, seed=8)])

    assert among[-2].text == alone
    assert among[-1].text != alone


def test_memory_tokens_and_handles_in_questions_and_texts_are_text(decoder, memories):
    handle = f"<|softmem:{memories[0].key}|>"
    for spoken in ("<MEM>", "<AE>", handle):
        request = DecodeRequest(
            question=f"What is {spoken}{spoken}?",
            documents=[memories[0], f"{spoken} is a word."],
            max_new_tokens=3,
        )

        result = decoder.generate([request])[0]

        assert result.soft_tokens == len(memories[0])


def test_a_memory_of_another_model_is_refused(decoder, memories):
    foreign = replace(memories[0], fingerprint="0" * 32)

    with pytest.raises(MemoryMismatchError, match="Compress the documents again"):
        decoder.generate([DecodeRequest(question="Why?", documents=[foreign])])
    with pytest.raises(MemoryMismatchError):
        next(decoder.stream(DecodeRequest(question="Why?", documents=[foreign])))


def test_a_memory_that_is_not_finite_is_refused(decoder, memories):
    values = memories[0].values.clone()
    values[0, 0] = float("nan")

    with pytest.raises(NonFiniteMemoryError, match="Compress its document again"):
        decoder.generate(
            [DecodeRequest(question="Why?", documents=[replace(memories[0], values=values)])]
        )


def test_a_prompt_longer_than_the_decoder_reads_is_refused(decoder):
    with pytest.raises(ValueError, match="the decoder reads 2048"):
        decoder.generate([DecodeRequest(question="Why?", documents=["word " * 3000])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature must be from 0.0 to 1000.0, found nan"),
        ({"temperature": 10**400}, "temperature must be from 0.0 to 1000.0"),
        ({"seed": 2**63}, "seed must be from -9223372036854775808 to 9223372036854775807"),
        ({"stop": [""]}, "list of non-empty"),
    ],
)
def test_senseless_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DecodeRequest(question="Why?", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question": None}, "question must be a string, found None"),
        ({"documents": "Rome"}, "documents must be a list, found 'Rome'"),
        ({"documents": [5]}, r"documents\[0\] must be of type str or Memory, found 5"),
        ({"max_new_tokens": "3"}, "max_new_tokens must be a whole number, found '3'"),
        ({"temperature": "0.5"}, "temperature must be a number, found '0.5'. Give a float"),
        ({"stop": "\n"}, "stop must be a list"),
    ],
)
def test_requests_of_another_kind_are_named(options, message):
    with pytest.raises(TypeError, match=message):
        DecodeRequest(**{"question": "Why?", **options})


def test_answers_do_not_change_the_adapters_meaning():
    model = build_model()
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model.decoder(input_ids=ids).logits

    decoder = TorchDecoder(model)

    torch.testing.assert_close(decoder.model.decoder(input_ids=ids).logits, expected)
    assert not [name for name, _ in model.decoder.named_parameters() if "lora" in name]


@pytest.mark.parametrize("text", ["déjà vu — 東京 🙂🙂 ok", "a\ufffdb", " leading", "tail \n"])
def test_characters_are_never_given_out_in_parts(text):
    tokenizer = build_tokenizer("Qwen3")
    detokenizer = Detokenizer(tokenizer)

    pieces = [detokenizer.push(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    pieces.append(detokenizer.finish())

    assert "".join(pieces) == text == detokenizer.text
    assert text.count("\ufffd") == "".join(pieces[:-1]).count("\ufffd")


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_decided():
    tokenizer = build_tokenizer("Llama")

    def feed(text):
        detokenizer = Detokenizer(tokenizer, ["\n\n", "END"])
        pieces = [detokenizer.push(tokenizer.encode(c, add_special_tokens=False)[0]) for c in text]
        return pieces, detokenizer.finish(), detokenizer

    assert feed("aE")[:2] == (["a", ""], "E")
    assert feed("aENb")[:2] == (["a", "", "", "ENb"], "")
    pieces, rest, detokenizer = feed("a\n\n")
    assert (pieces, rest, detokenizer.stopped) == (["a", "", ""], "", True)
