import json
import sys

import pytest

from softrag.documents import Document
from softrag.errors import MissingExtraError, UnreadableFileError
from softrag.evaluation import (
    Question,
    Scores,
    aggregate,
    exact_match,
    f1,
    match,
    normalize_answer,
    read_questions,
    rouge_l,
    score,
    score_answers,
)

LINE = {
    "id": "q1",
    "question": "Who wrote it?",
    "answers": ["Ada", "Ada Lovelace"],
    "docs": [
        {"title": "Notes", "text": "Ada wrote it.", "gold": True},
        {"title": "", "text": "Nobody did."},
        "Or a bare text.",
    ],
    "source": "mine",
}


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Beatles", "beatles"),
        ("  a  cat,\n AN owl ", "cat owl"),
        ("U.S.A.", "usa"),
        ("Theatre and another", "theatre and another"),
        ("well-known", "wellknown"),
        ("Café", "café"),
        ("The", ""),
    ],
)
def test_answers_are_normalized_as_squad_does(text, normalized):
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("The Seine.", ["seine"], 100.0),
        ("the river Seine", ["Seine"], 0.0),
        ("Seine", ["Thames", "the Seine"], 100.0),
        ("", ["Seine"], 0.0),
        ("", ["The"], 100.0),
    ],
)
def test_exact_match(prediction, answers, expected):
    assert exact_match(prediction, answers) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("the river Seine", ["Seine"], 200 / 3),  # precision 1/2, recall 1
        ("Seine", ["the river Seine", "Thames"], 200 / 3),
        ("red red blue", ["red blue blue"], 200 / 3),  # two words in common, of three each
        ("in 1928 in London", ["London in 1928"], 600 / 7),  # precision 3/4, recall 1
        ("Thames", ["Seine"], 0.0),
        ("", ["Seine"], 0.0),
        ("The", ["a"], 100.0),
    ],
)
def test_f1(prediction, answers, expected):
    assert f1(prediction, answers) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("It is the Seine, of course.", ["Seine"], 100.0),
        ("Born in 1928.", ["2"], 0.0),
        ("I know.", ["no"], 0.0),
        ("No, never.", ["no"], 100.0),
        ("Ada, then Lovelace", ["Ada Lovelace"], 0.0),
        ("by Ada the Lovelace", ["Ada Lovelace"], 100.0),
        ("Lovelace", ["Ada Lovelace"], 0.0),
        ("anything", ["the"], 0.0),
        ("", ["Seine"], 0.0),
    ],
)
def test_match_wants_whole_words_in_a_row(prediction, answers, expected):
    assert match(prediction, answers) == expected


def test_rouge_l_is_the_longest_common_subsequence():
    pytest.importorskip("rouge_score")

    # "police the gunman": 3 words of 4 on both sides
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == pytest.approx(75.0)
    assert rouge_l("the gunman kill police", ["police killed the gunman"]) == pytest.approx(50.0)
    assert rouge_l("x", ["y", "x"]) == 100.0
    assert rouge_l("", ["y"]) == 0.0


def test_all_scores_of_one_answer():
    pytest.importorskip("rouge_score")

    assert score("The river Seine", ["Seine", "the Seine"]) == Scores(
        em=0.0, f1=pytest.approx(200 / 3), match=100.0, rouge_l=pytest.approx(80.0)
    )


def test_without_rouge_score_the_other_scores_remain(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    from softrag import evaluation

    evaluation._rouge_scorer.cache_clear()

    assert score("Seine", ["Seine"]) == Scores(em=100.0, f1=100.0, match=100.0, rouge_l=None)
    assert score_answers(["Seine"], [["Seine"]]) == {"em": 100.0, "f1": 100.0, "match": 100.0}
    with pytest.raises(MissingExtraError, match=r"ROUGE-L needs .*softrag-memory\[train\]"):
        rouge_l("Seine", ["Seine"])


def test_the_aggregate_is_the_mean():
    scores = [
        Scores(em=100.0, f1=100.0, match=100.0, rouge_l=50.0),
        Scores(em=0.0, f1=50.0, match=100.0, rouge_l=0.0),
    ]

    assert aggregate(scores) == Scores(em=50.0, f1=75.0, match=100.0, rouge_l=25.0)
    assert aggregate([*scores, Scores(em=0.0, f1=0.0, match=0.0)]).rouge_l is None


def test_many_answers_are_scored_by_name():
    means = score_answers(["Paris", "Rome, Italy"], [["Paris"], ["Rome", "Roma"]])

    assert (means["em"], means["match"]) == (50.0, 100.0)
    assert means["f1"] == pytest.approx((100 + 200 / 3) / 2)


@pytest.mark.parametrize("answers", [[], "Paris"])
def test_accepted_answers_are_a_list_that_is_not_empty(answers):
    with pytest.raises(ValueError, match="Expected a list of accepted answers, at least one"):
        score("Paris", answers)


def test_no_scores_have_no_mean():
    with pytest.raises(ValueError, match="no scores"):
        aggregate([])
    with pytest.raises(ValueError, match="2 predictions for 1 questions"):
        score_answers(["a", "b"], [["a"]])


def write(path, *lines) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def test_a_question_file_is_read_with_its_documents(tmp_path):
    bare = {"question": "Where?", "answers": ["Here"]}
    write(tmp_path / "set.jsonl", json.dumps(LINE), "", json.dumps(bare))

    assert read_questions(tmp_path / "set.jsonl") == [
        Question(
            id="q1",
            question="Who wrote it?",
            answers=("Ada", "Ada Lovelace"),
            documents=(
                Document(text="Ada wrote it.", title="Notes"),
                Document(text="Nobody did.", title=None),
                Document(text="Or a bare text."),
            ),
            gold=(True, False, False),
            source="mine",
        ),
        Question(
            id="set-3", question="Where?", answers=("Here",), documents=(), gold=(), source="set"
        ),
    ]


def test_a_compressed_file_reads_as_the_plain_one_even_in_several_frames(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    lines = [json.dumps({**LINE, "id": f"q{n}", "question": "où ça ?"}) + "\n" for n in range(50)]
    (tmp_path / "set.jsonl").write_text("".join(lines), encoding="utf-8")
    # The cut is inside a line.
    data = "".join(lines).encode()
    frames = [zstandard.compress(data[:1000]), zstandard.compress(data[1000:])]
    (tmp_path / "set.jsonl.zst").write_bytes(b"".join(frames))

    compressed = read_questions(tmp_path / "set.jsonl.zst")

    assert len(compressed) == 50
    assert compressed == read_questions(tmp_path / "set.jsonl")
    assert read_questions(tmp_path / "set.jsonl.zst", limit=2) == compressed[:2]


def test_a_limit_leaves_the_rest_unread(tmp_path):
    write(tmp_path / "set.jsonl", json.dumps(LINE), "not JSON")

    assert [each.id for each in read_questions(tmp_path / "set.jsonl", limit=1)] == ["q1"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"question": ', "Expecting value"),
        ("[1]", r"expected a JSON object, found '\[1\]'"),
        ('{"answers": ["a"]}', r"expected \"question\", found \"\['answers'\]\""),
        ('{"question": "q"}', r"expected \"answers\", found \"\['question'\]\""),
        ('{"question": "q", "answers": "a"}', 'expected "answers" to be a list'),
        ('{"question": "q", "answers": []}', 'expected "answers" to be strings, at least one'),
        ('{"question": "q", "answers": [2]}', 'expected "answers" to be strings'),
        ('{"question": " ", "answers": ["a"]}', 'expected text in "question"'),
        ('{"question": 1, "answers": ["a"]}', 'expected "question" to be a str'),
        ('{"question": "q", "answers": ["a"], "docs": {}}', 'expected "docs" to be a list'),
        ('{"question": "q", "answers": ["a"], "docs": [1]}', "expected a document to be a JSON"),
        ('{"question": "q", "answers": ["a"], "docs": [{"title": "t"}]}', 'expected "text"'),
        ('{"question": "q", "answers": ["a"], "docs": [{"text": ""}]}', 'expected text in "text"'),
        (
            '{"question": "q", "answers": ["a"], "docs": [{"text": "d", "title": 1}]}',
            'expected "title"',
        ),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path, line, problem):
    write(tmp_path / "set.jsonl", json.dumps(LINE), "", line)

    with pytest.raises(UnreadableFileError, match=rf"set\.jsonl, line 3: {problem}"):
        read_questions(tmp_path / "set.jsonl")


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path):
    (tmp_path / "set.jsonl").write_bytes(json.dumps(LINE).encode() + b"\n\n\xff\n")

    with pytest.raises(UnreadableFileError, match=r"set\.jsonl, line 3 cannot be read.*utf-8"):
        read_questions(tmp_path / "set.jsonl")


def test_a_file_that_is_not_zstd_is_named(tmp_path):
    pytest.importorskip("zstandard")
    write(tmp_path / "set.jsonl.zst", json.dumps(LINE))

    with pytest.raises(UnreadableFileError, match=r"set\.jsonl\.zst cannot be read: zstd"):
        read_questions(tmp_path / "set.jsonl.zst")


def test_a_missing_or_empty_file_is_named(tmp_path):
    write(tmp_path / "empty.jsonl", "")

    with pytest.raises(UnreadableFileError, match=r"none\.jsonl cannot be read"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(UnreadableFileError, match=r"empty\.jsonl holds no questions"):
        read_questions(tmp_path / "empty.jsonl")


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"set\.csv should end in \.jsonl or \.jsonl\.zst"):
        read_questions(tmp_path / "set.csv")


def test_a_missing_zstandard_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "set.jsonl.zst").touch()

    with pytest.raises(MissingExtraError, match=r"needs `zstandard`.*softrag-memory\[train\]"):
        read_questions(tmp_path / "set.jsonl.zst")
