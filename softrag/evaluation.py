r"""Scores of answers, and files of questions to score on. It knows no model.

Answers are compared as SQuAD compares them: lower case, without punctuation, without the articles
a, an and the. All scores are in percent, and the best over the accepted answers counts.

A question file (`.jsonl` or `.jsonl.zst`) has one JSON object a line::

    {"id": "q1", "question": "Who wrote it?", "answers": ["Ada", "Ada Lovelace"],
     "docs": [{"title": "Notes", "text": "Ada wrote it.", "gold": true}, "Or a bare text."],
     "source": "mine"}

`id`, `docs`, `source`, and a document's `title` and `gold` may be left out.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from softrag.checks import check_text
from softrag.documents import Document
from softrag.errors import UnreadableFileError
from softrag.extras import load_extra

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How good an answer is, or many are on average; in percent.

    Attributes:
        em: Exact match: the answer is an accepted one, and nothing else.
        f1: Words in common with an accepted answer.
        match: An accepted answer stands in the answer, as whole words. (The accuracy of the PISCO
            and OSCAR papers takes any substring, "2" in "1928" too, and so is never lower.)
        rouge_l: Longest common subsequence of words, unstemmed, as an F-measure; for long answers.
            None where rouge-score is not installed.
    """

    em: float
    f1: float
    match: float
    rouge_l: float | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with the documents it is asked over.

    Attributes:
        id: Names the question in results; the file's name and the line where the file says none.
        question: The question.
        answers: Accepted answers, at least one.
        documents: What to answer from, in the file's order.
        gold: For each document, whether it holds the answer; False where the file says nothing.
        source: The data set it comes from; the file's name where the file says nothing.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...]
    gold: tuple[bool, ...]
    source: str


def score(prediction: str, answers: Sequence[str]) -> Scores:
    """Score one answer.

    >>> score("It was in the year 1928.", ["1928", "in 1928"]).match
    100.0

    Args:
        prediction: The answer.
        answers: Accepted answers, at least one.

    Raises:
        ValueError: There is no accepted answer.
    """
    return Scores(
        em=exact_match(prediction, answers),
        f1=f1(prediction, answers),
        match=match(prediction, answers),
        rouge_l=rouge_l(prediction, answers) if _has_rouge_score() else None,
    )


def aggregate(scores: Sequence[Scores]) -> Scores:
    """Return the mean of each score.

    Raises:
        ValueError: There are no scores.
    """
    if not scores:
        raise ValueError("There are no scores to take the mean of.")
    return Scores(
        em=fmean(each.em for each in scores),
        f1=fmean(each.f1 for each in scores),
        match=fmean(each.match for each in scores),
        rouge_l=None
        if any(each.rouge_l is None for each in scores)
        else fmean(each.rouge_l for each in scores if each.rouge_l is not None),
    )


def score_answers(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the means over many questions by name; without `rouge_l` where it cannot be had.

    Args:
        predictions: One answer per question.
        answers: The accepted answers of each question.

    Raises:
        ValueError: The two differ in length or are empty, or a question has no accepted answer.
    """
    if len(predictions) != len(answers):
        raise ValueError(
            f"Found {len(predictions)} predictions for {len(answers)} questions; expected one each."
        )
    mean = aggregate([score(*each) for each in zip(predictions, answers, strict=True)])
    return {name: value for name, value in asdict(mean).items() if value is not None}


def normalize_answer(text: str) -> str:
    """Return the text as answers are compared, by SQuAD's rules.

    >>> normalize_answer(" The  Beatles' album, a classic!")
    'beatles album classic'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 100.0 if the answer is an accepted one, else 0.0."""
    found = normalize_answer(prediction)
    return 100.0 * any(found == normalize_answer(answer) for answer in _check(answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of words, 0.0 to 100.0."""
    found = normalize_answer(prediction).split()
    return 100.0 * max(_f1(found, normalize_answer(answer).split()) for answer in _check(answers))


def match(prediction: str, answers: Sequence[str]) -> float:
    """Return 100.0 if an accepted answer stands in the answer as whole words, else 0.0.

    >>> match("No one knows.", ["no"]), match("I know.", ["no"])
    (100.0, 0.0)
    """
    found = normalize_answer(prediction)
    wanted = (normalize_answer(answer) for answer in _check(answers))
    # Nothing is left of some answers, and nothing stands in everything.
    return 100.0 * any(f" {each} " in f" {found} " if each else not found for each in wanted)


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """Return the F-measure of ROUGE-L, 0.0 to 100.0.

    Raises:
        MissingExtraError: rouge-score is not installed.
    """
    scorer = _rouge_scorer()
    return 100.0 * max(
        scorer.score(answer, prediction)["rougeL"].fmeasure for answer in _check(answers)
    )


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """Read a question file, or its first questions.

    Args:
        path: Ends in `.jsonl` or `.jsonl.zst`.
        limit: Read so many questions at most; None reads all.

    Raises:
        UnreadableFileError: The file or a line of it is not as expected; says which line.
        MissingExtraError: The file is compressed, and zstandard is not installed.
        ValueError: `path` has another suffix.
    """
    path = Path(path)
    if not path.name.endswith((".jsonl", ".jsonl.zst")):
        raise ValueError(f"{path} should end in .jsonl or .jsonl.zst.")
    questions = [_question(path, *line) for line in islice(_lines(path), limit)]
    if not questions and limit != 0:
        raise UnreadableFileError(f"{path} holds no questions.")
    return questions


def _check(answers: Sequence[str]) -> Sequence[str]:
    if isinstance(answers, str) or not answers:
        raise ValueError(f"Expected a list of accepted answers, at least one, found {answers!r}.")
    return answers


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def _has_rouge_score() -> bool:
    return importlib.util.find_spec("rouge_score") is not None


@cache
def _rouge_scorer() -> Any:  # noqa: ANN401 - untyped library
    library = load_extra("rouge_score.rouge_scorer", extra="train", purpose="ROUGE-L")
    return library.RougeScorer(["rougeL"])


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbers, from 1, and texts of the lines that are not blank."""
    number = 0
    with ExitStack() as stack:
        failures: tuple[type[Exception], ...] = (OSError, UnicodeDecodeError)
        try:
            file: Any = stack.enter_context(path.open("rb"))
            if path.suffix == ".zst":
                zstandard = load_extra("zstandard", extra="train", purpose=f"Reading {path.name}")
                failures += (zstandard.ZstdError,)
                # Files written with a long window are refused unless the reader allows it.
                reader = zstandard.ZstdDecompressor(max_window_size=2**31)
                file = io.BufferedReader(reader.stream_reader(file, read_across_frames=True))
            # Bytes are split, and each line decoded by itself, so that the number is exact.
            for line in file:
                text = line.decode("utf-8-sig" if number == 0 else "utf-8")
                number += 1
                if text.strip():
                    yield number, text
        except failures as error:
            where = f", line {number + 1}" if isinstance(error, UnicodeDecodeError) else ""
            fix = " Save it as UTF-8." if where else ""
            raise UnreadableFileError(f"{path}{where} cannot be read: {error}.{fix}") from error


def _question(path: Path, number: int, line: str) -> Question:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise _unexpected("a JSON object", record)
        answers = _field(record, "answers", list)
        if not answers or not all(isinstance(answer, str) for answer in answers):
            raise _unexpected('"answers" to be strings, at least one', answers)
        documents = record.get("docs", [])
        if not isinstance(documents, list):
            raise _unexpected('"docs" to be a list', documents)
        read = [_document(document) for document in documents]
        name = path.name.split(".jsonl")[0]
        return Question(
            id=str(record.get("id") or f"{name}-{number}"),
            question=_field(record, "question", str),
            answers=tuple(answers),
            documents=tuple(document for document, _ in read),
            gold=tuple(gold for _, gold in read),
            source=str(record.get("source") or name),
        )
    except (ValueError, RecursionError) as error:  # JSON's own errors are of these kinds too.
        raise UnreadableFileError(
            f"{path}, line {number}: {str(error).rstrip('.')}. A question is written as "
            '{"question": "…", "answers": ["…"], "docs": [{"title": "…", "text": "…"}]}.'
        ) from error


def _document(record: object) -> tuple[Document, bool]:
    """Return a document, and whether it is gold."""
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, dict):
        raise _unexpected("a document to be a JSON object or a string", record)
    title = record.get("title")
    if not (title is None or isinstance(title, str)):
        raise _unexpected('"title" to be a string', title)
    check_text('"title"', title or "")
    gold = bool(record.get("gold", False))
    return Document(text=_field(record, "text", str), title=title or None), gold


def _field(record: dict[str, Any], name: str, kind: type) -> Any:  # noqa: ANN401 - of `kind`
    if name not in record:
        raise _unexpected(f'"{name}"', sorted(record))
    value = record[name]
    if not isinstance(value, kind):
        raise _unexpected(f'"{name}" to be a {kind.__name__}', value)
    if isinstance(value, str):
        check_text(f'"{name}"', value)
        if not value.strip():
            raise _unexpected(f'text in "{name}"', value)
    return value


def _unexpected(expected: str, found: object) -> ValueError:
    return ValueError(f"expected {expected}, found {str(found)[:80]!r}")
