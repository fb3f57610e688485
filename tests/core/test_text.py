from __future__ import annotations

import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from softrag.prompt import encode_text
from softrag.text import clean_text, memory_length, split_text

ARTICLE = """\
Paris is the capital of France, and the Seine runs through it. Its mayor sits in the Hôtel de Ville.

The Eiffel Tower was finished in 1889! Is it 330 metres high? It is. Visitors: 5,904,000 in 2022.

東京は日本の首都です。人口は千四百万人です。Ελληνικά κείμενα μετρούν κι αυτά. 👩‍👩‍👧 family.
"""


@pytest.fixture
def llama(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


def assert_nothing_is_dropped(text, spans):
    edges = [0, *(edge for span in spans for edge in (span.start, span.end)), len(text)]
    for start, end in list(pairwise(edges))[::2]:
        assert text[start:end].strip() == ""
    for span in spans:
        assert text[span.start : span.end] == span.text


def random_text(seed, length=400):
    choose = random.Random(seed)
    letters = "ab.é東👩\u200d👧\u0301\ud800e<|>MEM"
    blanks = " \n\t\r\u00a0\u00ad\u200b\ufeff\x00\x1e\x85\u2028\u2029"
    return "".join(choose.choices(letters + blanks, k=length))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("one\n\n\n\n\ntwo\u2029three", "one\n\ntwo\n\nthree"),
        ("a \t  b\u00a0c\u3000d", "a b c d"),
        ("def f():\n    return 1  \n", "def f():\n    return 1"),
        ("so\u00adft\u200bly\ufeff \x00nul\x1b", "softly nul"),
        ("e\u0301", "é"),
        ("e\u00ad\u0301", "é"),
        ("half \ud83d pair", "half \ufffd pair"),
        ("👩\u200d👧", "👩\u200d👧"),
        (" \n\t\u00a0\n", ""),
        # As fast as any other text: a minute, were every blank to look for the line's end.
        ("a" + " " * 100_000 + "b", "a b"),
        ("", ""),
    ],
)
def test_cleaning_gives_one_spelling(text, cleaned):
    assert clean_text(text) == cleaned


@pytest.mark.parametrize("seed", range(30))
def test_cleaning_twice_changes_nothing(seed):
    once = clean_text(random_text(seed))

    assert clean_text(once) == once


@pytest.mark.parametrize("max_tokens", [4, 16, 40, 1000])
def test_pieces_hold_the_whole_text_and_fit(tokenizer, max_tokens):
    spans = split_text(ARTICLE, tokenizer, max_tokens)

    assert_nothing_is_dropped(ARTICLE, spans)
    for span in spans:
        assert span.n_tokens == len(encode_text(tokenizer, span.text))
        assert span.n_tokens <= max_tokens or len(span.text) == 1


@pytest.mark.parametrize("seed", range(10))
def test_pieces_of_noise_hold_the_whole_text_and_fit(tokenizer, seed):
    text = clean_text(random_text(seed))

    spans = split_text(text, tokenizer, 24)

    assert_nothing_is_dropped(text, spans)
    assert max(span.n_tokens for span in spans) <= 24


def test_special_tokens_in_a_text_are_counted_as_the_text_they_are(tokenizer):
    text = "<MEM>" * 20 + " " + "".join(tokenizer.all_special_tokens) * 5

    spans = split_text(text, tokenizer, 16)

    assert_nothing_is_dropped(text, spans)
    assert max(len(encode_text(tokenizer, span.text)) for span in spans) <= 16


def test_a_text_is_split_between_paragraphs_first(llama):
    paragraphs = ["Paris is in France. The Seine runs through it.", "Water boils. So it does."]
    longest = max(len(encode_text(llama, paragraph)) for paragraph in paragraphs)

    spans = split_text("\n\n".join(paragraphs), llama, longest)

    assert [span.text for span in spans] == paragraphs


def test_a_paragraph_is_split_between_sentences(llama):
    sentences = ["Paris is the capital of France.", "Water boils at 100 degrees.", "So it does."]
    longest = max(len(encode_text(llama, sentence)) for sentence in sentences)

    spans = split_text(" ".join(sentences), llama, longest)

    assert [span.text for span in spans] == sentences


def test_a_word_longer_than_a_piece_is_split_inside(llama):
    word = "x9" * 200

    spans = split_text(word, llama, 8)

    assert "".join(span.text for span in spans) == word
    assert max(span.n_tokens for span in spans) <= 8


@pytest.mark.parametrize("letters", ["x9", "字", "🙂", "e\u0301"])
def test_a_word_of_thousands_of_characters_is_cut_and_nothing_lost(llama, letters):
    word = letters * (9000 // len(letters))

    spans = split_text(f"See {word}. The end.", llama, 128)

    assert_nothing_is_dropped(f"See {word}. The end.", spans)
    assert max(span.n_tokens for span in spans) <= 128
    # Where it is cut does not depend on what stands behind it.
    assert [span.text for span in split_text(f"See {word[:6000]}", llama, 128)][:9] == [
        span.text for span in spans[:9]
    ]


def test_sentences_without_blanks_between_them_are_not_cut_inside(llama):
    sentences = [f"第{number}話は東京の話です。" for number in range(300)]
    longest = max(len(encode_text(llama, sentence)) for sentence in sentences)

    spans = split_text("".join(sentences), llama, longest)

    assert [span.text for span in spans] == sentences


def test_a_short_text_is_one_piece_with_its_offsets(llama):
    (span,) = split_text("  Paris. ", llama, 128)

    assert (span.text, span.start, span.end) == ("Paris.", 2, 8)


@pytest.mark.parametrize("text", ["", "  \n\n "])
def test_a_blank_text_has_no_pieces(llama, text):
    assert split_text(text, llama, 128) == []


def test_a_piece_must_hold_a_token(llama):
    with pytest.raises(ValueError, match="max_tokens must be at least 1, found 0"):
        split_text("Paris", llama, 0)


@pytest.mark.parametrize(
    ("n_tokens", "rate", "length"),
    [(128, 16, 8), (129, 16, 9), (15, 16, 1), (16, 16, 1), (17, 16, 2), (0, 16, 1), (5, 1, 5)],
)
def test_a_memory_has_one_soft_token_for_every_rate_tokens_begun(n_tokens, rate, length):
    assert memory_length(n_tokens, rate) == length


@pytest.mark.parametrize(("n_tokens", "rate"), [(-1, 16), (128, 0)])
def test_a_memory_length_needs_sensible_numbers(n_tokens, rate):
    with pytest.raises(ValueError, match=f"found {n_tokens} and {rate}"):
        memory_length(n_tokens, rate)


def test_measuring_memories_needs_no_splitter():
    program = "import softrag.text, sys; sys.exit('semantic_text_splitter' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
