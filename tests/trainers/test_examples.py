"""Training rows and the files they come from."""

import json
from pathlib import Path

import pytest
import zstandard

from softrag.errors import UnreadableFileError
from softrag_trainers.examples import (
    QuestionRow,
    TextRow,
    load_questions,
    load_texts,
    save_questions,
    save_texts,
)

RECORDS = [
    {
        "id": "q1",
        "question": "Who built it?",
        "answers": ["Ada", "Ada Lovelace"],
        "docs": [
            {"title": "Notes", "text": "Ada built it.", "gold": True},
            {"title": "", "text": "It rained.", "gold": False},
        ],
        "source": "history",
    },
    {
        "id": "q2",
        "question": "Did it rain?",
        "answers": ["yes"],
        "docs": [{"title": None, "text": "It rained.", "gold": True}],
        "source": "weather",
    },
]
ROWS = [
    QuestionRow(
        id="q1",
        question="Who built it?",
        answers=("Ada", "Ada Lovelace"),
        documents=("Notes\nAda built it.", "It rained."),
        gold=(True, False),
        source="history",
    ),
    QuestionRow(
        id="q2",
        question="Did it rain?",
        answers=("yes",),
        documents=("It rained.",),
        gold=(True,),
        source="weather",
    ),
]


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_jsonl(folder: Path) -> Path:
    return write_lines(folder / "train.jsonl", *RECORDS)


def write_long_window_zst(folder: Path) -> Path:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    lines = write_jsonl(folder).read_bytes()
    path = folder / "train.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor(compression_params=parameters).compress(lines))
    return path


def write_parquet(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), folder / "train.parquet")
    return folder / "train.parquet"


def write_saved_dataset(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(RECORDS).save_to_disk(folder / "train")
    return folder / "train"


@pytest.mark.parametrize(
    "write", [write_jsonl, write_long_window_zst, write_parquet, write_saved_dataset]
)
def test_every_kind_of_file_gives_the_same_questions(write, tmp_path):
    assert load_questions(write(tmp_path)) == ROWS


def test_a_plain_folder_stands_for_its_files_in_order(tmp_path):
    write_lines(tmp_path / "b.jsonl", RECORDS[1])
    write_lines(tmp_path / "a.jsonl", RECORDS[0])
    (tmp_path / "README.md").write_text("not data")

    assert load_questions(tmp_path) == ROWS
    assert load_questions([tmp_path / "b.jsonl", tmp_path / "a.jsonl"]) == ROWS[::-1]


def test_documents_may_be_bare_texts_and_names_are_optional(tmp_path):
    path = write_lines(
        tmp_path / "mine.jsonl", {"question": "Why?", "answers": ["Rain"], "docs": ["It rained."]}
    )

    assert load_questions(path) == [
        QuestionRow("mine-1", "Why?", ("Rain",), ("It rained.",), (False,), "mine")
    ]


def test_equal_documents_share_one_string(tmp_path):
    first, second = load_questions(write_jsonl(tmp_path))

    assert first.documents[1] is second.documents[0]


def test_a_limit_ends_reading_before_a_later_bad_line(tmp_path):
    path = write_jsonl(tmp_path)
    path.write_text(path.read_text() + "not json\n")

    assert load_questions(path, limit=1) == ROWS[:1]


def test_a_cross_encoders_scores_are_read_saved_and_read_back(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", RECORDS[0] | {"relevance": [0.75, 0]}, RECORDS[1])

    rows = load_questions(path)
    save_questions(tmp_path / "mix.jsonl", rows)

    assert [row.relevance for row in rows] == [(0.75, 0), ()]
    assert load_questions(tmp_path / "mix.jsonl") == rows


@pytest.mark.parametrize("name", ["mix.jsonl", "mix.jsonl.zst"])
def test_a_saved_mixture_is_read_back(name, tmp_path):
    save_questions(tmp_path / name, ROWS)

    assert load_questions(tmp_path / name) == ROWS
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_mixture_stores_each_passage_once(tmp_path):
    save_questions(tmp_path / "mix.jsonl", ROWS)

    lines = [json.loads(line) for line in (tmp_path / "mix.jsonl").read_text().splitlines()]
    assert lines[:3] == [
        {"format": 1, "passages": 2},
        {"text": "Notes\nAda built it."},
        {"text": "It rained."},
    ]
    assert [line["doc_ids"] for line in lines[3:]] == [[0, 1], [1]]


def test_texts_are_saved_and_read_back(tmp_path):
    rows = [TextRow("It rained.\n\nThen not.", "weather"), TextRow("Été", "saisons")]
    save_texts(tmp_path / "texts.jsonl.zst", rows)

    assert load_texts(tmp_path / "texts.jsonl.zst") == rows
    assert load_texts(tmp_path / "texts.jsonl.zst", limit=1) == rows[:1]


def test_a_text_without_a_source_takes_its_files_name(tmp_path):
    assert load_texts(write_lines(tmp_path / "wiki.jsonl", {"text": "Rain."})) == [
        TextRow("Rain.", "wiki")
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "line 2: the field `question` is missing; found answers, docs"),
        ({"question": "  "}, "line 2: `question` should be a text that is not empty"),
        ({"answers": []}, "line 2: `answers` should hold at least one answer"),
        ({"answers": [""]}, "line 2: `answers` should hold at least one answer"),
        ({"answers": "yes"}, "line 2: `answers` should be a list, found 'yes'"),
        ({"answers": [1]}, "line 2: `answers` holds 1, which is of the wrong type"),
        ({"docs": [{"title": "Notes"}]}, "line 2: the field `text` is missing; found title"),
        ({"docs": [{"text": "x", "title": 3}]}, "line 2: `title` should be a text, found 3"),
        ({"docs": [4]}, "line 2: `docs` holds 4"),
        ({"relevance": [7.3]}, "line 2: `relevance` should be 1 numbers from 0 to 1, found [7.3]"),
        ({"relevance": [1, 0]}, "line 2: `relevance` should be 1 numbers from 0 to 1, found [1,"),
    ],
)
def test_a_bad_record_is_named_with_its_file_line_and_field(change, message, tmp_path):
    path = write_lines(tmp_path / "train.jsonl", RECORDS[0], RECORDS[1] | change)

    with pytest.raises(UnreadableFileError) as caught:
        load_questions(path)

    assert f"{path}, {message}" in str(caught.value)


def test_a_line_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "Rain."}\n\n{"text": \n')

    with pytest.raises(
        UnreadableFileError, match=r"train\.jsonl, at line 3: .*one JSON value a line"
    ):
        load_texts(path)


def test_a_line_that_is_no_object_is_named(tmp_path):
    with pytest.raises(UnreadableFileError, match=r"line 1: expected an object, found 'Rain\.'"):
        load_texts(write_lines(tmp_path / "texts.jsonl", "Rain."))


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"no zstd" + data])
def test_a_damaged_zst_file_is_an_error(damage, tmp_path):
    path = tmp_path / "texts.jsonl.zst"
    save_texts(path, [TextRow(f"It rained {day} days.", "weather") for day in range(50)])
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(UnreadableFileError, match=r"texts\.jsonl\.zst, at line"):
        load_texts(path)


def test_a_zst_file_of_several_frames_is_read_whole(tmp_path):
    rows = [TextRow(f"It rained {day} days.", "weather") for day in range(4)]
    save_texts(tmp_path / "a.jsonl.zst", rows[:2])
    save_texts(tmp_path / "b.jsonl.zst", rows[2:])
    both = (tmp_path / "a.jsonl.zst").read_bytes() + (tmp_path / "b.jsonl.zst").read_bytes()
    (tmp_path / "both.jsonl.zst").write_bytes(both)

    assert load_texts(tmp_path / "both.jsonl.zst") == rows


def test_a_damaged_parquet_file_is_an_error(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "texts.parquet").write_bytes(b"PAR1 and nothing more")

    with pytest.raises(UnreadableFileError, match=r"texts\.parquet is no parquet file"):
        load_texts(tmp_path / "texts.parquet")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"format": 2, "passages": 0}], "this mixture has format 2, this version reads 1"),
        ([{"format": 1}], "the field `passages` is missing; found format"),
        ([{"format": 1, "passages": 3}, {"text": "Rain."}], "3 passages are announced but 1"),
        (
            [
                {"format": 1, "passages": 1},
                {"text": "Rain."},
                {"question": "Why?", "answers": ["Rain"], "doc_ids": [1], "gold": [True]},
            ],
            "line 3: document 1 does not exist among 1 passages",
        ),
        (
            [
                {"format": 1, "passages": 1},
                {"text": "Rain."},
                {"question": "Why?", "answers": ["Rain"], "doc_ids": [0], "gold": []},
            ],
            "line 3: 1 `doc_ids` but 0 `gold` flags",
        ),
    ],
)
def test_a_broken_mixture_is_an_error(lines, message, tmp_path):
    with pytest.raises(UnreadableFileError) as caught:
        load_questions(write_lines(tmp_path / "mix.jsonl", *lines))

    assert message in str(caught.value)


def test_a_data_set_with_splits_asks_for_one(tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)})
    splits.save_to_disk(tmp_path / "both")

    with pytest.raises(UnreadableFileError, match=r"holds the splits train; name one of them"):
        load_questions(tmp_path / "both")


def test_files_of_other_kinds_and_empty_folders_are_refused(tmp_path):
    (tmp_path / "train.csv").write_text("question,answer\n")

    with pytest.raises(UnreadableFileError, match=r"train\.csv is of an unknown kind"):
        load_questions(tmp_path / "train.csv")
    with pytest.raises(UnreadableFileError, match=r"holds no data: expected \.jsonl"):
        load_questions(tmp_path)
    with pytest.raises(ValueError, match=r"should end in one of \.jsonl, \.jsonl\.zst"):
        save_questions(tmp_path / "mix.json", ROWS)


def test_questions_without_answers_are_read_for_a_teacher_to_answer(tmp_path):
    record = {name: value for name, value in RECORDS[1].items() if name != "answers"}
    path = write_lines(tmp_path / "asked.jsonl", RECORDS[0], record, RECORDS[1] | {"answers": []})

    rows = load_questions(path, answered=False)

    assert [row.answers for row in rows] == [("Ada", "Ada Lovelace"), (), ()]
    assert rows[0] == ROWS[0]


def test_a_row_that_does_not_match_its_documents_is_refused():
    with pytest.raises(ValueError, match="1 documents but 0 gold flags"):
        QuestionRow("q", "Why?", ("Rain",), ("It rained.",), (), "mine")
    with pytest.raises(ValueError, match="1 documents but 2 relevances"):
        QuestionRow("q", "Why?", ("Rain",), ("It rained.",), (True,), "mine", (1.0, 0.0))
    with pytest.raises(ValueError, match="expected numbers from 0 to 1"):
        QuestionRow("q", "Why?", ("Rain",), ("It rained.",), (True,), "mine", (7.3,))
