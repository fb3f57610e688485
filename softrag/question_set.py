"""Question files that bring their own documents, answered with a model. It knows no store.

One JSON object per line, in a `.jsonl` or `.jsonl.zst` file::

    {"id": "q1", "question": "Who wrote it?", "answers": ["Ada"],
     "docs": [{"title": "Notes", "text": "Ada wrote it."}, "Or a bare text."]}
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

from softrag.answer import Mode
from softrag.asking import Decoding, Question, Source, prepare, split_for
from softrag.compressor import Compressor
from softrag.decoder import Decoder, DecodeResult
from softrag.documents import document_text
from softrag.errors import UnreadableFileError
from softrag.extras import load_extra
from softrag.memory import Memory


@dataclass(frozen=True, kw_only=True)
class QuestionRecord:
    """A question with its documents.

    Attributes:
        id: Names the question in results; its line number unless the file says.
        question: The question.
        answers: Accepted answers.
        documents: Texts to answer from, best first.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class AnsweredSet:
    """A question set answered in one mode.

    Attributes:
        results: One per question, in order.
        text_prompt_tokens: What each prompt would have had with text.
        compress_s: Seconds spent on making memories.
        decode_s: Seconds spent on answering.
    """

    results: list[DecodeResult]
    text_prompt_tokens: list[int]
    compress_s: float
    decode_s: float


def read_questions(path: str | Path, limit: int | None = None) -> list[QuestionRecord]:
    """Read a question file, or its first `limit` questions.

    Raises:
        UnreadableFileError: The file is missing, empty, or a line is not as expected.
    """
    path = Path(path)
    try:
        with _open(path) as lines:
            numbered = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
            records = [_record(path, n, line) for n, line in islice(numbered, limit)]
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableFileError(f"{path} cannot be read: {error}.") from error
    if not records:
        raise UnreadableFileError(f"{path} holds no questions.")
    return records


def answer_set(
    records: Sequence[QuestionRecord],
    *,
    mode: Mode,
    decoder: Decoder,
    compressor: Compressor | None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    on_answers: Callable[[int], None] | None = None,
) -> AnsweredSet:
    """Answer all questions from their own documents; each distinct document is compressed once.

    Args:
        records: The questions.
        mode: What is read of the documents.
        decoder: Answers.
        compressor: Makes memories; needed by mode "memory".
        batch_size: Questions answered together.
        max_new_tokens: Most tokens of an answer.
        on_answers: Called with the number of new answers after every batch.
    """
    started = perf_counter()
    memories = _compress_all(records, compressor) if mode == "memory" else {}
    compress_s = perf_counter() - started
    results: list[DecodeResult] = []
    for first in range(0, len(records), batch_size):
        batch = records[first : first + batch_size]
        prepared = prepare(
            [Question(each.question, _sources(each, memories), started) for each in batch],
            mode=mode,
            decoding=Decoding(max_new_tokens, None, 0.0, None),
            decoder=decoder,
            compressor=compressor,
        )
        compress_s += prepared[0].compress_s
        results += decoder.generate([each.request for each in prepared])
        if on_answers is not None:
            on_answers(len(batch))
    return AnsweredSet(
        results=results,
        text_prompt_tokens=[
            decoder.prompt_tokens(each.question, each.documents) for each in records
        ],
        compress_s=compress_s,
        decode_s=perf_counter() - started - compress_s,
    )


def _compress_all(
    records: Sequence[QuestionRecord], compressor: Compressor | None
) -> dict[str, list[Memory]]:
    """Return every distinct document's memories: one, or several of a document that was split."""
    # Memories for a question are made with it, batch by batch.
    if compressor is None or compressor.query_dependent:
        return {}
    texts = list(dict.fromkeys(text for record in records for text in record.documents))
    pieces = [split_for(compressor, text) for text in texts]
    made = iter(compressor.compress([piece for split in pieces for piece in split]))
    return {text: list(islice(made, len(split))) for text, split in zip(texts, pieces, strict=True)}


def _sources(record: QuestionRecord, memories: dict[str, list[Memory]]) -> list[Source]:
    sources: list[Source] = []
    for text in record.documents:
        sources += memories.get(text) or [text]
    return sources


@contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    if path.suffix != ".zst":
        with path.open(encoding="utf-8") as lines:
            yield lines
        return
    zstandard = load_extra("zstandard", extra="train", purpose="Reading .zst files")
    with path.open("rb") as data:
        # The largest window there is: files of large windows are common among data sets.
        reader = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(data)
        try:
            yield io.TextIOWrapper(reader, encoding="utf-8")
        except zstandard.ZstdError as error:
            raise UnreadableFileError(f"{path} is not a zstd file: {error}.") from error


def _record(path: Path, number: int, line: str) -> QuestionRecord:
    try:
        values = json.loads(line)
        documents = tuple(_document(each) for each in values.get("docs", []))
        answers = values["answers"]
        if not isinstance(answers, list) or not isinstance(values["question"], str):
            raise TypeError("question is a string and answers a list of strings")
        return QuestionRecord(
            id=str(values.get("id", number)),
            question=values["question"],
            answers=tuple(str(answer) for answer in answers),
            documents=tuple(text for text in documents if text.strip()),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnreadableFileError(
            f'{path}, line {number}: expected {{"question": "…", "answers": ["…"], "docs": '
            f'[{{"title": "…", "text": "…"}}]}}, found {line.strip()[:80]!r} ({error!r}).'
        ) from error


def _document(value: Any) -> str:  # noqa: ANN401 - any JSON value
    if isinstance(value, str):
        return value
    return document_text(value.get("title"), value["text"])
