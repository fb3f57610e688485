"""What labelling promises: every label once, whatever stops it, and where it came from."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest

from softrag.errors import EndpointError, UnreadableFileError
from softrag_trainers.__main__ import main
from softrag_trainers.examples import load_questions
from softrag_trainers.labelling import label, read_pairs
from softrag_trainers.options import read_options
from softrag_trainers.teachers import LocalTeacher
from tests.chat_server import serve_chat
from tests.checkpoints import build_checkpoint
from tests.families import FAMILIES, SENTENCES, build_family
from tests.trainers.tiny import QUESTIONS, question_records, write_lines


def today() -> str:
    return datetime.datetime.now().date().isoformat()


def options_for(out: Path, url: str, data: Path, *more: str) -> Any:
    return read_options(
        "label",
        [
            "task=answers",
            f"data=[{data}]",
            f"out={out}",
            f"teacher={url}",
            f"model={build_checkpoint()}",
            *more,
        ],
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def first_words(prompt: str) -> str:
    """Answer with the first words of the first document."""
    return " " + " ".join(prompt.split("Background:\n")[1].split()[:3]) + "\n"


def ask_about(prompt: str) -> str:
    """Ask twice about the text, once for what it does not say."""
    text = prompt.removeprefix("Text:\n").split("\n\nWrite")[0]
    words = text.split()
    return (
        f"Question 1: What stands before {words[-1]!r}?\nAnswer 1: {words[-2]}.\n\n"
        "Question 2: Who lives on the moon?\nAnswer 2: the man in the moon"
    )


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Eight questions of two documents, half of them without answers."""
    records = question_records()
    for record in records[4:]:
        del record["answers"]
    return write_lines(tmp_path / "questions.jsonl", records)


def test_questions_are_answered_from_the_full_text_with_where_it_came_from(
    tmp_path: Path, questions: Path
) -> None:
    out, days = tmp_path / "answered.jsonl", {today()}
    with serve_chat(first_words) as server:
        added = label(options_for(out, server.url, questions))
    days.add(today())

    assert added == len(QUESTIONS)
    assert server.prompts.count(server.prompts[0]) == 1
    assert sorted(server.prompts)[0].startswith(
        "Answer the question from the background, as briefly as possible.\n\nBackground:\n"
    )
    rows, taught = lines_of(out), load_questions(out)
    for row, again, (question, answer, gold) in zip(rows, taught, QUESTIONS, strict=True):
        assert again.question == question
        assert again.answers == (" ".join(SENTENCES[gold].split()[:3]),)
        assert again.documents[0] == SENTENCES[gold]
        assert again.gold == (True, False)
        assert again.source == "questions"
        assert f"{SENTENCES[gold]}\n{again.documents[1]}\n\nQuestion: {question}" in str(
            server.prompts
        ).replace("\\n", "\n").replace("\\'", "'")
        assert row.get("gold_answers", [answer]) == [answer]
        about = row["label"]
        assert (about["task"], about["teacher"]) == ("answers", "listed-model")
        assert about["date"] in days
        assert len(about["prompt"]) == len(about["key"]) == 32
    assert sum("gold_answers" in row for row in rows) == 4


def test_a_run_that_was_stopped_goes_on_where_it_ended(tmp_path: Path, questions: Path) -> None:
    out, whole = tmp_path / "answered.jsonl", tmp_path / "whole.jsonl"
    with serve_chat(first_words) as server:
        label(options_for(whole, server.url, questions))
        label(options_for(out, server.url, questions, "samples=3", "batch_size=2"))
        # Killed in the middle of a line.
        text = out.read_text()
        out.write_text(text[: len(text) - 20])
        asked = len(server.prompts)

        added = label(options_for(out, server.url, questions))
        again = label(options_for(out, server.url, questions))

    assert (added, again) == (len(QUESTIONS) - 2, 0)
    assert len(server.prompts) == asked + len(QUESTIONS) - 2
    assert lines_of(out) == lines_of(whole)


def test_equal_questions_over_equal_documents_are_answered_once(
    tmp_path: Path, questions: Path
) -> None:
    twice = write_lines(tmp_path / "twice.jsonl", lines_of(questions) * 2)
    with serve_chat(first_words) as server:
        assert label(options_for(tmp_path / "out.jsonl", server.url, twice)) == len(QUESTIONS)
    assert len(server.prompts) == len(QUESTIONS)


def test_labels_of_another_teacher_or_prompt_are_not_mixed(tmp_path: Path, questions: Path) -> None:
    out = tmp_path / "answered.jsonl"
    with serve_chat(first_words) as server:
        label(options_for(out, server.url, questions, "samples=1"))
        for other in ("teacher_model=other", "prompt='Background:\n{documents} {question}'"):
            with pytest.raises(ValueError, match=r"answered\.jsonl, line 1, was labelled with"):
                label(options_for(out, server.url, questions, other))
    assert len(lines_of(out)) == 1


def test_what_the_teacher_refuses_or_leaves_empty_is_left_out(
    tmp_path: Path, questions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def reply(prompt: str) -> str:
        asked = prompt.split("Question:")[-1]
        if "penicillin" in asked and refusing:
            raise ValueError("too long")
        return "" if "Hamlet" in asked else "Something"

    refusing = True
    with serve_chat(reply) as server:
        added = label(options_for(tmp_path / "out.jsonl", server.url, questions))
        assert caplog.text.count("left out: ") == caplog.text.count("400 ") == 1
        assert added == len(QUESTIONS) - 2
        # Another day the one that was refused is answered.
        refusing = False
        assert label(options_for(tmp_path / "out.jsonl", server.url, questions)) == 1
        server.failures[:] = [401] * 100
        with pytest.raises(EndpointError, match="401"):
            label(options_for(tmp_path / "other.jsonl", server.url, questions))


def test_documents_are_asked_about_in_the_compressors_chunks(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "notes.md").write_text("# Notes\n\n" + "\n\n".join(SENTENCES))
    (docs / "broken.txt").write_bytes(b"\xff\xfe\xff")
    out = tmp_path / "made.jsonl"

    with serve_chat(ask_about) as server:
        added = label(
            options_for(out, server.url, docs, "task=questions", "chunk_tokens=24", "questions=2")
        )
        assert label(options_for(out, server.url, docs, "task=questions", "chunk_tokens=24")) == 0

    rows = load_questions(out)
    assert added == len(rows) > 3
    for row, line in zip(rows, lines_of(out), strict=True):
        (document,) = row.documents
        assert row.gold == (True,)
        assert document.startswith("Notes\n")
        assert row.question == f"What stands before {document.split()[-1]!r}?"
        assert row.answers == (document.split()[-2],)
        assert line["label"]["document"] == str(docs / "notes.md")
    assert any("Write 2 different questions" in prompt for prompt in server.prompts)


def test_a_question_is_made_up_once_whatever_it_was_made_of(tmp_path: Path) -> None:
    texts = write_lines(
        tmp_path / "texts.jsonl", [{"text": f"{text} Ada wrote it."} for text in SENTENCES[:3]]
    )
    reply = "Question: Who wrote it?\nAnswer: Ada"

    with serve_chat(lambda prompt: reply) as server:
        options = options_for(tmp_path / "o.jsonl", server.url, texts, "task=questions")
        assert label(options) == 1


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Question: Who wrote it?\nAnswer: Ada.", [("Who wrote it?", "Ada")]),
        ("**Question:** no\nAnswer: Ada", []),
        ("Question: Who wrote it?\nAnswer: Bob", []),
        ("Question: Who?\nAnswer: " + "Ada " * 13, []),
        ("Ada wrote it.", []),
        ("", []),
    ],
)
def test_only_pairs_in_form_with_an_answer_from_the_text_are_kept(
    reply: str, expected: list[tuple[str, str]]
) -> None:
    assert read_pairs(reply, "Ada wrote it. " + "Ada " * 13) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_this_process_replies_the_same_alone_and_together(family: str) -> None:
    teacher = LocalTeacher(str(build_family(family)))
    prompts = ["Who wrote Hamlet?", " ".join(SENTENCES), "Where is <|im_end|> </s> Paris?"]

    together = teacher.complete(prompts, max_tokens=6)
    alone = [teacher.complete([prompt], max_tokens=6)[0] for prompt in prompts]

    assert together == alone
    assert any(together)
    # A special token in a prompt is text: it ends nothing.
    assert len(teacher._encode("</s>")) > len(teacher._encode("x"))


def test_a_base_model_labels_from_the_command_line(tmp_path: Path, questions: Path) -> None:
    out = tmp_path / "answered.jsonl"
    arguments = ["label", "task=answers", f"data=[{questions}]", f"out={out}", "max_tokens=4"]

    assert main([*arguments, f"teacher={build_family('Llama')}"]) == 0

    assert {row["label"]["teacher"] for row in lines_of(out)} == {str(build_family("Llama"))}
    assert load_questions(out)[0].answers[0]


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ("task=poems", 1, "task is 'poems'; expected one of answers, questions"),
        ("out=labels.txt", 1, "appended line by line to a .jsonl file"),
        ("data=[nowhere.jsonl]", 1, "nowhere.jsonl"),
        ("teacher=http://127.0.0.1:9", 1, "Check the URL"),
        ("temperature=1", 2, "temperature"),
        ("data=null", 2, "data"),
    ],
)
def test_what_cannot_be_labelled_is_said(
    change: str,
    code: int,
    message: str,
    tmp_path: Path,
    questions: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("softrag.chat_endpoint.time.sleep", lambda seconds: None)
    arguments = {
        "task": "answers",
        "data": f"[{questions}]",
        "out": tmp_path / "out.jsonl",
        "teacher": build_family("Llama"),
    }
    name, value = change.split("=", 1)
    overrides = [f"{key}={each}" for key, each in {**arguments, name: value}.items()]

    assert main(["label", *overrides]) == code
    assert re.search(re.escape(message), capsys.readouterr().err)


def test_a_damaged_output_is_named(tmp_path: Path, questions: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("not json\n")
    with serve_chat(first_words) as server, pytest.raises(UnreadableFileError, match=r"out\.jsonl"):
        label(options_for(out, server.url, questions))
