"""Plans of training runs: every run composes, and one that fails stops only what needs it."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType

import pytest

from softrag_trainers.options import Finetune, Pretrain, read_options
from tests.families import build_family
from tests.trainers.tiny import question_records, text_records, tiny_arch, write_lines

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PLANS = sorted((BENCHMARKS / "plans").glob("*.yaml"))


@pytest.fixture(scope="module")
def ablations() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablations", BENCHMARKS / "ablations.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablations"] = module
    spec.loader.exec_module(module)
    return module


def machine(ablations: ModuleType, out: Path, **files: list[str]):
    kinds = {"texts": [], "questions": [], "dev": [], "start": ["softrag-demo"]} | files
    return ablations.Machine(out=out, files=kinds, limit=3, tiny=None, commit="abc")


@pytest.mark.parametrize("plan", PLANS, ids=lambda path: path.stem)
def test_every_run_of_a_shipped_plan_composes(ablations: ModuleType, plan: Path) -> None:
    runs = ablations.read_plan(plan)
    on = machine(ablations, Path("out"), texts=["a.jsonl", "b.jsonl"], dev=["c.jsonl"])

    for run in runs.values():
        command = on.train(run, list(runs))
        stage = command[command.index("softrag_trainers") + 1 :]
        options = read_options(stage[0], stage[1:])

        assert isinstance(options, {"pretrain": Pretrain, "finetune": Finetune}[run.stage])
        assert options.optimizer.minutes == run.minutes
        assert options.model == (f"out/{run.model}" if run.model in runs else run.model)
        if run.stage == "pretrain":
            assert options.data.train == ["a.jsonl", "b.jsonl"]


def test_runs_share_gpus_and_the_least_busy_is_taken_first(ablations: ModuleType) -> None:
    free = [0, 0, 1, 1]

    assert ablations.take(free, 1) == [0]
    assert ablations.take(free, 1) == [1]
    assert ablations.take(free, 2) == [0, 1]
    assert ablations.take(free, 1) is None
    free = [0, 0]
    assert ablations.take(free, 2) is None
    assert free == [0, 0]


def test_several_gpus_are_used_through_torchs_launcher(ablations: ModuleType) -> None:
    run = ablations.Planned(name="wide", stage="pretrain", minutes=1, gpus=2)

    command = machine(ablations, Path("out")).train(run, ["wide"])

    assert command[1:4] == ["-m", "torch.distributed.run", "--standalone"]
    assert "--nproc-per-node=2" in command


def test_chosen_runs_get_another_seed_and_what_they_need_keeps_its_own(
    ablations: ModuleType, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        """
        runs:
          base: {stage: pretrain, minutes: 2}
          text: {stage: finetune, minutes: 2}
          other: {stage: finetune, minutes: 2, model: base}
          replay-qa: {stage: finetune, minutes: 2, model: base}
          distilled-qa: {stage: finetune, minutes: 2, model: base, teacher: text}
        """
    )
    runs = ablations.read_plan(plan)

    chosen = ablations.choose(runs, ["distilled-qa", "replay-qa"], 1)

    assert {name: run.seed for name, run in chosen.items()} == {
        "base": 0, "text": 0, "distilled-qa@1": 1, "replay-qa@1": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("run: {}", r"unknown fields \['run'\]"),
        ("runs: {a: {stage: train, minutes: 1}}", "Run a has stage 'train'"),
        ("runs: {a: {stage: finetune, minutes: 1, model: b}, "
         "b: {stage: finetune, minutes: 1, model: a}}", r"\['a', 'b'\] wait for each other"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_carried_out_is_refused(
    ablations: ModuleType, tmp_path: Path, plan: str, message: str
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(plan)

    with pytest.raises(ValueError, match=message):
        ablations.read_plan(file)


@pytest.mark.parametrize("as_given", [False, True])
def test_documents_are_scored_in_the_files_order_only_if_asked_for(
    ablations: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_given: bool
) -> None:
    commands: list[list[str]] = []

    def note(command: list[str], **_: object) -> CompletedProcess[str]:
        commands.append(command)
        return CompletedProcess(command, 0)

    monkeypatch.setattr(ablations.subprocess, "run", note)
    on = replace(machine(ablations, tmp_path, dev=["dev.jsonl"]), as_given=as_given)

    on.carry_out(ablations.Planned(name="run", stage="finetune", minutes=1), ["run"], [0])

    train, score = commands
    assert "--as-given" not in train
    assert ("--as-given" in score) == as_given


def test_a_failed_run_is_named_and_the_others_go_on_and_are_not_repeated(
    ablations: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write_lines(tmp_path / "texts.jsonl", text_records())
    questions = write_lines(tmp_path / "questions.jsonl", question_records())
    short = ["optimizer.steps=1", "optimizer.batch_size=4", "data.min_chunk_tokens=8"]
    options = [*tiny_arch(), *short, f"data.train=[{texts}]", "data.max_chunk_tokens=24"]
    learn = [*tiny_arch(), *short[:2], f"data.train=[{questions}]"]

    def planned(name: str, stage: str, options: list[str], model: str | None = None):
        return ablations.Planned(
            name=name, stage=stage, minutes=1.0, options=options, model=model
        )  # fmt: skip

    runs = {
        run.name: run
        for run in (
            planned("broken", "pretrain", [*options, "data.nonsense=1"]),
            planned("after", "finetune", learn, model="broken"),
            planned("sound", "finetune", [*learn, "data.max_new_tokens=2"]),
        )
    }
    on = machine(ablations, tmp_path / "out", dev=[str(questions)])
    on.out.mkdir()

    assert build_family("Llama").is_dir()
    assert not ablations.carry_out(runs, on, gpus=2, together=1, stop_after=None)

    rows = [json.loads(line) for line in (on.out / "rows.jsonl").read_text().splitlines()]
    by_name = {row["name"]: row for row in rows}
    assert set(by_name) == {"broken", "sound"}
    assert by_name["broken"]["failed"].startswith("training ended with 2: usage")
    assert "after: not run, needs ['broken']" in capsys.readouterr().out
    sound = by_name["sound"]
    assert (sound["failed"], sound["steps"], sound["commit"]) == (None, 1, "abc")
    assert set(sound["scores"]["questions"]["memory"]) == {"em", "f1", "match", "prompt_tokens"}
    table = (on.out / "table.md").read_text()
    assert "| broken | 0 | failed: training" in table
    assert "| sound | 0 | 1.0, 1 | 1 |" in table
    assert not ablations.carry_out(runs, on, gpus=2, together=1, stop_after=None)
    again = [json.loads(line) for line in (on.out / "rows.jsonl").read_text().splitlines()]
    assert [row["name"] for row in again[len(rows) :]] == ["broken"]
