"""Training data and options small enough for a test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from softrag_trainers.examples import QuestionRow, TextRow
from tests.families import SENTENCES, build_family

QUESTIONS = [
    ("What is the capital of France?", "Paris", 1),
    ("Who wrote Hamlet?", "William Shakespeare", 2),
    ("Where does water boil at 100 degrees Celsius?", "at sea level", 3),
    ("Who discovered penicillin?", "Alexander Fleming", 4),
    ("What is the largest river in the world?", "The Amazon", 5),
    ("In which city was it discovered?", "London", 4),
    ("Which river runs through Paris?", "the Seine", 1),
    ("When was King Lear written?", "between 1599 and 1606", 2),
]


def question_rows() -> list[QuestionRow]:
    """Return eight questions of two documents each, the right one first."""
    return [
        QuestionRow(
            id=f"q{number}",
            question=question,
            answers=(answer,),
            documents=(SENTENCES[gold], SENTENCES[gold % 5 + 2]),
            gold=(True, False),
            source="tiny",
        )
        for number, (question, answer, gold) in enumerate(QUESTIONS)
    ]


def question_records() -> list[dict[str, object]]:
    """Return the same questions as the records of a file."""
    return [
        {
            "question": row.question,
            "answers": list(row.answers),
            "docs": [
                {"text": text, "gold": gold}
                for text, gold in zip(row.documents, row.gold, strict=True)
            ],
        }
        for row in question_rows()
    ]


def text_rows() -> list[TextRow]:
    """Return twelve texts of several sentences."""
    return [
        TextRow(" ".join(SENTENCES[start % 8 :] + SENTENCES[: start % 8]), "tiny")
        for start in range(12)
    ]


def text_records() -> list[dict[str, object]]:
    """Return the same texts as the records of a file."""
    return [{"text": row.text} for row in text_rows()]


def write_lines(path: Path, records: Sequence[object]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tiny_arch(family: str = "Llama") -> list[str]:
    """Return the options that build a tiny model."""
    folder = build_family(family)
    return [
        f"arch.decoder={folder}",
        f"arch.compressor={folder}",
        "arch.compressor_layers=1",
        "arch.rate=4",
        "arch.max_document_tokens=64",
        "arch.connector_hidden=16",
        "arch.decoder_lora_r=4",
    ]
