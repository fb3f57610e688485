"""Typed training rows, and the files they come from. It knows nothing of tokens or tensors.

Two kinds of row: `TextRow` for pre-training, `QuestionRow` for fine-tuning and evaluation. Both
load from JSON lines (`.jsonl`, `.jsonl.zst`), parquet, a saved Hugging Face `datasets` folder, or
a plain folder of such files.

A question's record holds its documents in place::

    {"id": "q1", "question": "Who wrote it?", "answers": ["Ada"], "source": "mine",
     "docs": [{"title": "Notes", "text": "Ada wrote it.", "gold": true}, "Or a bare text."]}

or, in a *mixture* (see `save_questions`), by number: the first line is the manifest
`{"format": 1, "passages": n}`, the next n lines are the passages, and every question after them
has `"doc_ids": [4, 0]` and `"gold": [true, false]`. A passage shared by ten questions is then
stored once, on disk and in memory. Either kind may have `"relevance": [0.97, 0.02]`, a
cross-encoder's probability for each document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from softrag.documents import document_text
from softrag.errors import UnreadableFileError
from softrag.extras import load_extra
from softrag_trainers.json_lines import SUFFIXES, read_json_lines, write_json_lines

MIXTURE_FORMAT = 1

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class TextRow:
    """A text to pre-train on.

    Attributes:
        text: The text itself.
        source: The collection it belongs to.
    """

    text: str
    source: str


@dataclass(frozen=True, slots=True)
class QuestionRow:
    """A question with the documents it is asked over.

    Attributes:
        id: Names the row in messages and result files.
        question: The question as a user would ask it.
        answers: Accepted answers; the first is the one that is taught. None only where a teacher
            is still to be asked.
        documents: What is compressed, in the order it is shown: title line, then text.
        gold: For each document, whether it holds the answer. All False when nobody said.
        source: The data set it belongs to.
        relevance: For each document, how relevant a cross-encoder finds it, from 0 to 1; empty
            when none was asked. A rerank head then learns from it instead of from `gold`.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]
    gold: tuple[bool, ...]
    source: str
    # Collators seed their choices with a row's repr, which scores should not change.
    relevance: tuple[float, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Refuse a row that says too much or too little of its documents."""
        if len(self.gold) != len(self.documents):
            raise ValueError(
                f"Question {self.id!r} has {len(self.documents)} documents but {len(self.gold)} "
                "gold flags; expected one flag a document."
            )
        if self.relevance and len(self.relevance) != len(self.documents):
            raise ValueError(
                f"Question {self.id!r} has {len(self.documents)} documents but "
                f"{len(self.relevance)} relevances; expected none, or one a document."
            )
        if not all(0 <= relevance <= 1 for relevance in self.relevance):
            raise ValueError(
                f"Question {self.id!r} has relevances {self.relevance}; expected numbers from 0 to "
                "1, such as the sigmoid of a cross-encoder's score."
            )


def load_texts(paths: Paths, limit: int | None = None) -> list[TextRow]:
    """Read pre-training texts: records with `text` and, optionally, `source`.

    Args:
        paths: One or more files or folders, read in this order.
        limit: Stop after this many rows; None reads all.

    Raises:
        UnreadableFileError: A file or record cannot be used; says which, and what is missing.
    """
    return list(islice(_texts(paths), limit))


def load_questions(
    paths: Paths, limit: int | None = None, *, answered: bool = True
) -> list[QuestionRow]:
    """Read questions with their documents; the module's docstring shows the records.

    `id` and `source` may be absent: they default to the file's name, with the line's number for
    `id`. Equal documents of one call share one string.

    Args:
        paths: One or more files or folders, read in this order.
        limit: Stop after this many rows; None reads all.
        answered: Whether every question must have an answer.

    Raises:
        UnreadableFileError: A file or record cannot be used; says which, and what is missing.
    """
    return list(islice(_questions(paths, answered=answered), limit))


def save_texts(path: str | Path, rows: Sequence[TextRow]) -> None:
    """Write texts to `.jsonl` or `.jsonl.zst`, for `load_texts`."""
    write_json_lines(Path(path), ({"text": row.text, "source": row.source} for row in rows))


def save_questions(path: str | Path, rows: Sequence[QuestionRow]) -> None:
    """Write a mixture to `.jsonl` or `.jsonl.zst`, for `load_questions`: each passage once."""
    # Neighbours of one source compress well together, so passages are sorted by source;
    # the questions keep their order.
    numbers: dict[str, int] = {}
    for row in sorted(rows, key=lambda row: row.source):
        for document in row.documents:
            numbers.setdefault(document, len(numbers))

    def records() -> Iterator[dict[str, object]]:
        yield {"format": MIXTURE_FORMAT, "passages": len(numbers)}
        for passage in numbers:
            yield {"text": passage}
        for row in rows:
            yield {
                "id": row.id,
                "question": row.question,
                "answers": row.answers,
                "doc_ids": [numbers[document] for document in row.documents],
                "gold": row.gold,
                "source": row.source,
                **({"relevance": row.relevance} if row.relevance else {}),
            }

    write_json_lines(Path(path), records())


class _Record(NamedTuple):
    """One record and where it stands, for messages and defaults."""

    path: Path
    line: int
    fields: Mapping[str, object]

    def error(self, problem: str) -> UnreadableFileError:
        return UnreadableFileError(f"{self.path}, line {self.line}: {problem}")

    def get(self, name: str, default: object = None) -> object:
        value = self.fields.get(name)
        if value is None and default is None:
            raise self.error(
                f"the field `{name}` is missing; found {', '.join(sorted(self.fields)) or 'none'}."
            )
        return default if value is None else value

    def text(self, name: str, default: str | None = None) -> str:
        value = self.get(name, default)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"`{name}` should be a text that is not empty, found {value!r:.80}.")
        return value

    def items(self, name: str, kind: type | tuple[type, ...]) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise self.error(f"`{name}` should be a list, found {value!r:.80}.")
        for item in value:
            # bool is an int to Python; a flag is no document number.
            if not isinstance(item, kind) or (kind is int and isinstance(item, bool)):
                raise self.error(f"`{name}` holds {item!r:.80}, which is of the wrong type.")
        return [*value]


def _texts(paths: Paths) -> Iterator[TextRow]:
    for path in _data_files(paths):
        for record in _records(path):
            yield TextRow(record.text("text"), record.text("source", default=_stem(path)))


def _questions(paths: Paths, *, answered: bool) -> Iterator[QuestionRow]:
    known: dict[str, str] = {}
    for path in _data_files(paths):
        records = _records(path)
        passages: list[str] = []
        for record in records:
            # Only a first line that asks nothing is a manifest: a row may have such a field too.
            if record.line == 1 and "format" in record.fields and "question" not in record.fields:
                passages = _passages(record, records)
                continue
            known_answers = answered or record.fields.get("answers")
            answers = record.items("answers", str) if known_answers else []
            if (answered and not answers) or not all(answer.strip() for answer in answers):
                raise record.error("`answers` should hold at least one answer, none of them empty.")
            if "doc_ids" in record.fields:
                documents, gold = _documents_by_number(record, passages)
            else:
                documents, gold = _documents_in_place(record)
                documents = [known.setdefault(document, document) for document in documents]
            yield QuestionRow(
                id=record.text("id", default=f"{_stem(path)}-{record.line}"),
                question=record.text("question"),
                answers=tuple(answers),
                documents=tuple(documents),
                gold=tuple(gold),
                source=record.text("source", default=_stem(path)),
                relevance=tuple(_relevance(record, len(documents))),
            )


def _relevance(record: _Record, documents: int) -> list[float]:
    if record.fields.get("relevance") is None:
        return []
    relevance = record.items("relevance", (int, float))
    if len(relevance) != documents or not all(0 <= value <= 1 for value in relevance):
        raise record.error(
            f"`relevance` should be {documents} numbers from 0 to 1, found {relevance!r:.80}."
        )
    return relevance


def _passages(manifest: _Record, records: Iterator[_Record]) -> list[str]:
    """Read the passages that follow a mixture's manifest."""
    if manifest.fields["format"] != MIXTURE_FORMAT:
        raise manifest.error(
            f"this mixture has format {manifest.fields['format']!r}, this version reads "
            f"{MIXTURE_FORMAT}. Write it again with softrag_trainers.distractors, or upgrade."
        )
    count = manifest.get("passages")
    if not isinstance(count, int):
        raise manifest.error(f"`passages` should be a number, found {count!r}.")
    passages = [record.text("text") for record in islice(records, count)]
    if len(passages) < count:
        raise manifest.error(
            f"{count} passages are announced but {len(passages)} follow: the file is cut short. "
            "Write or copy it again."
        )
    return passages


def _documents_by_number(
    record: _Record, passages: Sequence[str]
) -> tuple[list[str], Sequence[bool]]:
    numbers = record.items("doc_ids", int)
    gold = record.items("gold", bool)
    for number in numbers:
        if not 0 <= number < len(passages):
            raise record.error(f"document {number} does not exist among {len(passages)} passages.")
    if len(gold) != len(numbers):
        raise record.error(f"{len(numbers)} `doc_ids` but {len(gold)} `gold` flags.")
    return [passages[number] for number in numbers], gold


def _documents_in_place(record: _Record) -> tuple[list[str], list[bool]]:
    documents, gold = [], []
    for item in record.items("docs", (str, Mapping)):
        # A document is a record of its own, so that its errors name the same line.
        document = record._replace(fields={"text": item} if isinstance(item, str) else item)
        title = document.fields.get("title")
        if not isinstance(title, str | None):
            raise document.error(f"`title` should be a text, found {title!r:.80}.")
        documents.append(document_text(title, document.text("text")))
        gold.append(bool(document.fields.get("gold")))
    return documents, gold


def _stem(path: Path) -> str:
    """Return a file's name without its suffixes: `train` for `train.jsonl.zst`."""
    return path.name.partition(".")[0]


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _data_files(paths: Paths) -> Iterator[Path]:
    """Yield files and saved data sets; a plain folder stands for the data files in it."""
    readable = (*SUFFIXES, ".parquet")
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(path)
        if not path.is_dir() or _is_saved_dataset(path):
            yield path
            continue
        files = sorted(file for file in path.iterdir() if file.name.endswith(readable))
        if not files:
            raise UnreadableFileError(
                f"{path} holds no data: expected {', '.join(readable)} files, or a folder "
                "written by `datasets.Dataset.save_to_disk`."
            )
        yield from files


def _records(path: Path) -> Iterator[_Record]:
    if path.is_dir():
        rows = _dataset_rows(path)
    elif path.name.endswith(SUFFIXES):
        rows = read_json_lines(path)
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path)
    else:
        raise UnreadableFileError(
            f"{path} is of an unknown kind: expected {', '.join(SUFFIXES)}, .parquet, or a folder."
        )
    for line, fields in rows:
        if not isinstance(fields, Mapping):
            raise UnreadableFileError(
                f"{path}, line {line}: expected an object, found {fields!r:.80}."
            )
        yield _Record(path, line, fields)


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    parquet = load_extra("pyarrow.parquet", extra="train", purpose="Reading parquet files")
    pyarrow = load_extra("pyarrow", extra="train", purpose="Reading parquet files")
    line = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    line += 1
                    yield line, fields
    except pyarrow.ArrowInvalid as error:
        raise UnreadableFileError(
            f"{path} is no parquet file, or a damaged one: {error}"
        ) from error


def _dataset_rows(path: Path) -> Iterator[tuple[int, object]]:
    datasets = load_extra("datasets", extra="train", purpose="Reading saved data sets")
    dataset = datasets.load_from_disk(str(path))
    if isinstance(dataset, datasets.DatasetDict):
        raise UnreadableFileError(
            f"{path} holds the splits {', '.join(dataset)}; name one of them: "
            f"{path / next(iter(dataset))}."
        )
    yield from enumerate(dataset, start=1)
