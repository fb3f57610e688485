"""The shipped documents: attributed, readable, and with an answer to every demo question."""

from __future__ import annotations

import json
import re
from pathlib import Path

from softrag.files import read_files

DEMO = Path(__file__).parent.parent / "softrag" / "demo"
CORPUS = DEMO / "corpus"


def test_every_article_is_attributed():
    attribution = (CORPUS / "ATTRIBUTION").read_text(encoding="utf-8")
    listed = re.findall(r"^[* ] (\S+\.md) +https://en\.wikipedia\.org/wiki/\S+$", attribution, re.M)

    assert "Attribution-ShareAlike" in attribution
    assert listed == sorted(path.name for path in CORPUS.glob("*.md"))


def test_the_corpus_is_articles_and_nothing_else():
    results = list(read_files([CORPUS]))

    assert [result.error for result in results] == [None] * 80
    assert all(len(document.text) > 500 for result in results for document in result.documents)


def test_every_demo_question_is_answered_by_its_article():
    questions = json.loads((DEMO / "questions.json").read_text(encoding="utf-8"))

    assert len(questions) == 10
    for question in questions:
        article = (CORPUS / question["file"]).read_text(encoding="utf-8")
        assert question["answers"][0] in article, question["question"]
