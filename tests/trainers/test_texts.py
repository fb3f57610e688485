"""Pre-training texts: pieces of long documents, mixed by weight."""

import pytest

from softrag_trainers.examples import TextRow, load_texts, save_texts
from softrag_trainers.texts import main, mix_texts, split_paragraphs


def rows_of(source: str, count: int) -> list[TextRow]:
    return [TextRow(f"{source} {number} " + "word " * 8, source) for number in range(count)]


def shares(rows: list[TextRow]) -> dict[str, int]:
    return {source: sum(row.source == source for row in rows) for source in ("big", "small")}


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("\n \n", []),
        ("One two.", ["One two."]),
        ("One two.\n\nThree.\nFour five.", ["One two.\nThree.", "Four five."]),
        ("One two. Three! Four five six.", ["One two. Three!", "Four five six."]),
        ("One.\nTwo three. Four five.", ["One.\nTwo three.", "Four five."]),
        ("a b c d e f g", ["a b c", "d e f", "g"]),
    ],
)
def test_texts_are_cut_between_paragraphs_then_sentences_then_words(text, pieces):
    assert split_paragraphs(text, max_words=3) == pieces


def test_a_quotation_mark_stays_with_its_sentence():
    assert split_paragraphs('He said "no." She left.', max_words=3) == [
        'He said "no."',
        "She left.",
    ]


def test_pieces_need_room_for_a_word():
    with pytest.raises(ValueError, match="max_words is 0"):
        split_paragraphs("One.", max_words=0)


@pytest.mark.parametrize(
    ("words", "weights", "expected"),
    [
        (100, None, {"big": 8, "small": 2}),
        (100, {"small": 4}, {"big": 5, "small": 5}),
        # What the small source cannot give, the big one gives.
        (500, {"small": 100}, {"big": 30, "small": 20}),
        (100, {"small": 0}, {"big": 10, "small": 0}),
        (10_000, None, {"big": 80, "small": 20}),
        (500, {"small": 0, "big": 0}, {"big": 0, "small": 0}),
    ],
)
def test_sources_share_the_budget_by_size_and_weight(words, weights, expected):
    # Every row has 10 words.
    rows = [*rows_of("big", 80), *rows_of("small", 20)]

    assert shares(mix_texts(rows, words, weights=weights)) == expected


def test_a_mixture_is_shuffled_and_decided_by_its_seed():
    rows = [*rows_of("big", 20), *rows_of("small", 5)]

    assert mix_texts(rows, 250) == mix_texts(rows, 250)
    assert mix_texts(rows, 250) != mix_texts(rows, 250, seed=1)
    assert sorted(row.text for row in mix_texts(rows, 250)) == sorted(row.text for row in rows)


def test_unknown_sources_and_negative_weights_are_refused():
    with pytest.raises(ValueError, match=r"the source 'tiny', but the rows have \['big'\]"):
        mix_texts(rows_of("big", 2), 10, weights={"tiny": 1})
    with pytest.raises(ValueError, match="The weight of 'big' is -1"):
        mix_texts(rows_of("big", 2), 10, weights={"big": -1})


def test_the_command_splits_drops_and_mixes(tmp_path):
    save_texts(
        tmp_path / "in.jsonl",
        [TextRow("One two three.\nFour five six.\nSeven.", "a=b"), TextRow("Too short.", "c")],
    )
    out = tmp_path / "out.jsonl.zst"

    options = "--words 100 --piece-words 3 --min-words 3 --weight a=b=2".split()
    main([str(tmp_path / "in.jsonl"), "--out", str(out), *options])

    assert sorted(row.text for row in load_texts(out)) == ["Four five six.", "One two three."]


def test_a_weight_without_a_number_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["in.jsonl", "--out", "out.jsonl", "--words", "1", "--weight", "wiki=much"])

    assert "expected SOURCE=NUMBER, found 'wiki=much'" in capsys.readouterr().err
