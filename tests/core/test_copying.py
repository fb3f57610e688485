"""What a copy bias promises: answers in the words of the texts, and nothing else changed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from softrag.compressor import Compressor
from softrag.decoder import DecodeRequest, TorchDecoder
from softrag.decoder.copying import Copier, CopySource
from softrag.decoder.sampling import Biases
from softrag.prompt import encode_text
from tests.checkpoints import build_model
from tests.families import SENTENCES

TEXTS = [
    "The historian Hiram Bingham came to\nMachu Picchu in 1911 (from the U.S.).",
    "Zoë\u2019s café stands in 東京, near Machu Picchu Road.",
]
END = 10**6


def copier(tokenizer: PreTrainedTokenizerBase, texts: list[str] = TEXTS) -> Copier:
    return Copier([CopySource(tokenizer, text) for text in texts], {END})


def favoured(copying: Copier) -> set[int]:
    return set(copying.favoured().tolist())


def follow(copying: Copier, ids: list[int]) -> list[bool]:
    """Say of each token whether it was favoured when it came."""
    told = []
    for token in ids:
        told.append(token in favoured(copying))
        copying.push(token)
    return told


@pytest.mark.parametrize(
    "copied",
    [
        "Hiram Bingham",
        "1911 (from the U.S.)",
        "came to Machu Picchu in 1911",
        "Zoë\u2019s café",
        "東京, near",
        "The historian",
    ],
)
def test_what_stands_in_a_text_is_favoured_from_the_first_token_to_the_end(
    tokenizer: PreTrainedTokenizerBase, copied: str
):
    copying = copier(tokenizer)

    told = follow(copying, encode_text(tokenizer, copied))

    assert all(told)
    assert END in favoured(copying)


def test_behind_a_word_another_word_of_the_texts_may_follow(tokenizer: PreTrainedTokenizerBase):
    copying = copier(tokenizer)

    assert all(follow(copying, encode_text(tokenizer, "historian stands in Machu Picchu Road")))


def test_within_a_word_only_its_own_tokens_are_favoured(tokenizer: PreTrainedTokenizerBase):
    copying = copier(tokenizer, ["Bartholomew"])
    first, second, *_ = encode_text(tokenizer, "Bartholomew")

    assert favoured(copying) == {first}
    copying.push(first)
    assert favoured(copying) == {second}


def test_words_of_the_models_own_are_left_alone_until_one_of_the_texts_follows(
    tokenizer: PreTrainedTokenizerBase,
):
    copying = copier(tokenizer)
    own, texts_word = encode_text(tokenizer, "Xavi"), encode_text(tokenizer, " historian")

    for token in own:
        copying.push(token)
        assert favoured(copying) == set()
    copying.push(texts_word[0])

    assert follow(copying, texts_word[1:]) == [True] * len(texts_word[1:])
    assert END in favoured(copying)


def test_special_tokens_in_a_text_are_letters(tiny_llama: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    source = CopySource(tokenizer, "Say <|eot_id|> twice")

    assert not set(source.ids) & set(tokenizer.all_special_ids)


def test_no_text_favours_nothing(tiny_llama: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    for texts in ([], [""], [" \n"]):
        assert favoured(copier(tokenizer, texts)) == set()


def test_tokens_that_no_model_writes_are_left_out():
    biases = Biases([1], [np.array([0, 3, 3, 99])], [2.0])

    assert biases.added_to(torch.ones(2, 4)).tolist() == [[1, 1, 1, 1], [3, 1, 1, 3]]


def test_a_slow_tokenizer_is_named():
    class Slow:
        is_fast = False

    with pytest.raises(TypeError, match=r"found Slow\. Its folder needs a tokenizer\.json"):
        CopySource(Slow(), "Paris")


# Answers


@pytest.fixture(scope="module")
def model():
    return build_model("Qwen3")


@pytest.fixture(scope="module")
def requests(model) -> list[DecodeRequest]:
    memories = Compressor(model).compress(SENTENCES)
    return [
        DecodeRequest(
            question="Who wrote Hamlet?",
            documents=memories[place : place + 2],
            max_new_tokens=12,
            copy_from=SENTENCES[place : place + 2],
            copy_bias=bias,
        )
        for place, bias in ((0, 100.0), (2, 0.0), (4, 100.0), (1, 1.5))
    ]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_strong_bias_leaves_the_model_the_choice_among_the_texts_words(
    model, requests, fused, temperature
):
    decoder = TorchDecoder(model, fused=fused)

    for request in (requests[0], requests[2]):
        asked = replace(request, temperature=temperature, seed=7)
        (answer,) = decoder.generate([asked])
        words = re.findall(r"\w+", answer.text)
        if answer.finish_reason == "length":
            words.pop()  # It may be cut off.
        assert answer.text
        assert set(words) <= set(re.findall(r"\w+", " ".join(request.copy_from)))


def test_neighbours_with_and_without_a_bias_change_nothing_for_each_other(model, requests):
    together = TorchDecoder(model).generate(requests)
    alone = [TorchDecoder(model, fused=False).generate([each])[0] for each in requests]
    streamed = ["".join(TorchDecoder(model).stream(each)) for each in requests]

    assert [result.text for result in together] == [result.text for result in alone] == streamed
    for one, other in zip(together, alone, strict=True):
        assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-4)


def test_log_probabilities_are_the_models_own(model, requests):
    plain, biased = (
        TorchDecoder(model).generate([replace(requests[0], copy_bias=bias)])[0]
        for bias in (0.0, 100.0)
    )

    # The likeliest token is the one that it would have written without.
    assert biased.token_logprobs[0] <= plain.token_logprobs[0]
    assert all(each < -0.1 for each in biased.token_logprobs)


def test_a_bias_without_texts_and_texts_without_a_bias_change_nothing(model, requests):
    decoder = TorchDecoder(model)
    plain, no_texts, no_bias = (
        decoder.generate([replace(requests[0], **options)])[0].text
        for options in (
            {"copy_from": (), "copy_bias": 0.0},
            {"copy_from": ()},
            {"copy_bias": 0.0},
        )
    )

    assert no_texts == no_bias == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copy_bias": -1.0}, "copy_bias"),
        ({"copy_bias": 101.0}, "copy_bias"),
        ({"copy_bias": float("nan")}, "copy_bias"),
        ({"copy_from": "one text"}, "copy_from"),
        ({"copy_from": [3]}, "copy_from"),
    ],
)
def test_senseless_biases_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        DecodeRequest(question="Who?", **options)
