"""Train and score the runs of a plan, side by side on the GPUs of one machine.

    python benchmarks/ablations.py benchmarks/plans/ablations.yaml --out runs --gpus 2 \
        --texts texts.parquet --questions questions.jsonl --qa-dev qa_dev/*.jsonl.zst

A plan says what is trained; a run starts when what it needs is there and as many GPUs are free::

    always: [run.compile=true]                        # options of every run
    pretrain: ["data.train=[{texts}]"]                # of every run of a stage
    finetune: ["data.train=[{questions}]", "data.validation=[{dev}]"]
    runs:
      base: {stage: pretrain, minutes: 9, gpus: 2, options: [optimizer.batch_size=288]}
      text: {stage: finetune, minutes: 3, options: [data.text_share=1], modes: [text]}
      pisco: {stage: finetune, minutes: 6, model: base, teacher: text}

`model` and `teacher` name another run, or a checkpoint. `minutes` is `optimizer.minutes`, `recipe`
is the trainers', `modes` is what a fine-tuned model is asked to read ([memory] unless told).

In the folder: `rows.jsonl`, a line for every run as soon as it ends (the last one of a name
counts); `table.md`, made anew each time; `NAME/log.txt`. A run that failed is named, the others go
on without what needs it. Started again, runs with a good row are skipped. `--dry` trains every run
for two steps on a tiny model, on any machine: no typing error is left to find on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import torch
import yaml

ROOT = Path(__file__).parent.parent
DEV = ("eval_loss", "eval_loss_shuffled", "eval_loss_without")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of a plan, as the plan's own fields say."""

    name: str
    stage: str
    minutes: float
    options: list[str] = field(default_factory=list)
    recipe: str = "demo"
    seed: int = 0
    gpus: int = 1
    model: str | None = None
    teacher: str | None = None
    modes: list[str] = field(default_factory=lambda: ["memory"])


@dataclass(frozen=True)
class Machine:
    """Where runs are carried out, and on what."""

    out: Path
    files: dict[str, list[str]]
    limit: int
    tiny: Path | None
    commit: str
    as_given: bool = False

    def folder(self, run: str) -> Path:
        """Return where a run's files are."""
        return self.out / run

    def train(self, run: Planned, names: Sequence[str]) -> list[str]:
        """Return the command that trains a run."""
        start = [sys.executable]
        if run.gpus > 1:
            start += ["-m", "torch.distributed.run", "--standalone"]
            start += [f"--nproc-per-node={run.gpus}"]
        settings = [f"recipe={run.recipe}", *run.options, f"out_dir={self.folder(run.name)}"]
        settings += [f"run.seed={run.seed}", f"optimizer.minutes={run.minutes}"]
        for key, value in (("model", run.model), ("teacher", run.teacher)):
            if value is not None:
                settings.append(f"{key}={self.folder(value) if value in names else value}")
        for kind, paths in self.files.items():
            listed = ",".join(paths)
            settings = [each.replace(f"{{{kind}}}", listed) for each in settings]
        return [*start, "-m", "softrag_trainers", run.stage, *settings, *self._dry(run)]

    def _dry(self, run: Planned) -> list[str]:
        if self.tiny is None:
            return []
        shared = "arch.compressor=shared" in run.options
        settings = {
            "arch.decoder": self.tiny,
            **({} if shared else {"arch.compressor": self.tiny}),
            "data.samples": 200,
            "optimizer.steps": 2,
            "optimizer.batch_size": 4,
            "run.bf16": "false",
            "run.compile": "false",
            "run.workers": 0,
            "run.eval_rows": 4,
            "run.eval_every": 1,
            "run.log_every": 1,
            # It would not fit the tiny model.
            "warm_start.checkpoint": "null",
            "warm_start.reader": "false",
        }
        if run.stage == "finetune":
            settings |= {"data.max_new_tokens": 2, "replay.samples": 50}
        return [f"{key}={value}" for key, value in settings.items()]

    def carry_out(self, run: Planned, names: Sequence[str], gpus: Sequence[int]) -> dict:
        """Train and score a run on these GPUs; return its row."""
        folder, began = self.folder(run.name), time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
            "PYTHONUNBUFFERED": "1",
        }
        train = self.train(run, names)
        score = [sys.executable, str(ROOT / "benchmarks" / "score.py"), str(folder)]
        score += [*self.files["dev"], f"--json={folder / 'scores.json'}", f"--limit={self.limit}"]
        score += ["--modes", *run.modes, *(["--as-given"] if self.as_given else [])]
        for stale in ("scores.json", "trainer_state.json"):
            (folder / stale).unlink(missing_ok=True)
        failed = None
        with (folder / "log.txt").open("w") as log:
            for command in (train, score):
                if command is score and (run.stage == "pretrain" or not self.files["dev"]):
                    break
                log.write(" ".join(command) + "\n")
                log.flush()
                code = subprocess.run(
                    command, env=environment, stdout=log, stderr=log, check=False
                ).returncode
                if code:
                    what = "training" if command is train else "scoring"
                    failed = f"{what} ended with {code}: {_last_line(folder / 'log.txt')}"
                    break
        return {
            "name": run.name,
            "failed": failed,
            "stage": run.stage,
            "seed": run.seed,
            "minutes": run.minutes,
            "gpus": run.gpus,
            "model": run.model,
            "teacher": run.teacher,
            "options": [f"recipe={run.recipe}", *run.options],
            "commit": self.commit,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "versions": {"torch": torch.__version__},
            "seconds": round(time.perf_counter() - began),
            **_learned(folder / "trainer_state.json"),
            "scores": _read(folder / "scores.json"),
        }


def _learned(state: Path) -> dict:
    """Return what a training run logged: steps, speed, losses."""
    if not state.exists():
        return {}
    read = json.loads(state.read_text())
    history = read["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    found = {"steps": read["global_step"]}
    if losses:
        found["train_loss"] = round(fmean(losses[-5:]), 4)
    for entry in history:
        if "tokens_per_second" in entry:
            found["tokens_per_second"] = entry["tokens_per_second"]
    kept = next((entry["kept_step"] for entry in history if "kept_step" in entry), None)
    evaluated = [entry for entry in history if "eval_loss" in entry]
    if kept is not None:
        found["kept_step"] = kept
        evaluated = [entry for entry in evaluated if entry["step"] == kept]
    if evaluated:
        found |= {name: round(evaluated[-1][name], 4) for name in DEV}
        found["dev_losses"] = [
            [entry["step"], round(entry["eval_loss"], 4)] for entry in history if DEV[0] in entry
        ]
    return found


def _read(file: Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def read_plan(file: Path) -> dict[str, Planned]:
    """Read a plan, in its order.

    Raises:
        ValueError: A field or a stage is unknown, or two runs wait for each other.
    """
    plan = yaml.safe_load(file.read_text())
    unknown = set(plan) - {"always", "pretrain", "finetune", "runs"}
    if unknown:
        raise ValueError(f"{file} has unknown fields {sorted(unknown)}.")
    runs: dict[str, Planned] = {}
    for name, fields in plan["runs"].items():
        stage = fields["stage"]
        if stage not in ("pretrain", "finetune"):
            raise ValueError(f"Run {name} has stage {stage!r}; expected pretrain or finetune.")
        shared = [*plan.get("always", []), *plan.get(stage, [])]
        runs[name] = Planned(
            name=name, **fields | {"options": [*shared, *fields.get("options", [])]}
        )
    done: set[str] = set()
    while len(done) < len(runs):
        ready = {name for name, run in runs.items() if needs(run, runs) <= done}
        if ready == done:
            raise ValueError(f"{file}: {sorted(set(runs) - done)} wait for each other.")
        done = ready
    return runs


def needs(run: Planned, runs: dict[str, Planned]) -> set[str]:
    """Return the other runs that a run starts from or learns from."""
    return {name for name in (run.model, run.teacher) if name in runs}


def good_rows(out: Path) -> dict[str, dict]:
    """Return the last row of every run that did not fail."""
    file = out / "rows.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    last = {row["name"]: row for row in map(json.loads, lines)}
    return {name: row for name, row in last.items() if row["failed"] is None}


def write_table(out: Path) -> None:
    """Write `table.md`: a line for every run, the last row of each."""
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    last = {row["name"]: row for row in rows}
    sets = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    lines = [
        "| run | seed | minutes, GPUs | steps | tokens/s | train loss | dev loss: true / another's "
        f"/ average memories | reads | mean F1 |{''.join(f' {name} |' for name in sets)}",
        "|---" * (9 + len(sets)) + "|",
    ]
    for row in last.values():
        lines += _lines(row, sets)
    lines.append("\nBy set: EM / F1 [95 % bootstrap interval] / match, in percent.")
    (out / "table.md").write_text("\n".join(lines) + "\n")


def _lines(row: dict, sets: list[str]) -> Iterator[str]:
    if row["failed"] is not None:
        yield f"| {row['name']} | {row['seed']} | failed: {row['failed'].replace('|', '/')} |"
        return
    dev = " / ".join(f"{row[name]:.3f}" for name in DEV if name in row)
    start = (
        f"| {row['name']} | {row['seed']} | {row['minutes']}, {row['gpus']} | {row.get('steps')} |"
        f" {row.get('tokens_per_second', '')} | {row.get('train_loss')} | {dev} |"
    )
    modes = list(dict.fromkeys(mode for by_mode in row["scores"].values() for mode in by_mode))
    for mode in modes:
        read = [row["scores"].get(name, {}).get(mode) for name in sets]
        f1 = fmean(each["f1"][0] for each in read if each)
        yield f"{start} {mode} | {f1:.1f} |" + "".join(
            f" {each['em'][0]} / {each['f1'][0]} {each['f1'][1:]} / {each['match'][0]} |"
            if each
            else " |"
            for each in read
        )
    if not modes:
        yield start + " | |" + " |" * len(sets)


def carry_out(
    runs: dict[str, Planned], machine: Machine, gpus: int, together: int, stop_after: float | None
) -> bool:
    """Carry out what has no row yet; tell whether every run has a good one in the end."""
    began = time.monotonic()
    free = [gpu for gpu in range(gpus) for _ in range(together)]
    names = list(runs)
    waiting = [run for name, run in runs.items() if name not in good_rows(machine.out)]
    failed: set[str] = set()
    running: dict[Future[dict], tuple[Planned, list[int]]] = {}
    with ThreadPoolExecutor(max_workers=gpus * together) as pool:
        while True:
            for run in list(waiting):
                wanted = needs(run, runs)
                over = stop_after is not None and (
                    (time.monotonic() - began) / 60 + run.minutes > stop_after
                )
                if wanted & failed or over or run.gpus > gpus:
                    why = f"needs {sorted(wanted & failed)}" if wanted & failed else (
                        "there is no time for it" if over else f"needs {run.gpus} GPUs"
                    )  # fmt: skip
                    print(f"{run.name}: not run, {why}", flush=True)
                    waiting.remove(run)
                    failed.add(run.name)
                elif wanted <= set(good_rows(machine.out)):
                    taken = take(free, run.gpus)
                    if taken is None:
                        break  # It is this one's turn; what stands behind it waits too.
                    print(f"{run.name}: started on {taken}", flush=True)
                    running[pool.submit(machine.carry_out, run, names, taken)] = (run, taken)
                    waiting.remove(run)
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, taken = running.pop(future)
                free = sorted([*free, *taken])
                row = future.result()
                with (machine.out / "rows.jsonl").open("a") as rows:
                    rows.write(json.dumps(row) + "\n")
                write_table(machine.out)
                if row["failed"] is not None:
                    failed.add(run.name)
                print(f"{run.name}: {row['failed'] or 'done'} in {row['seconds']} s", flush=True)
    return not failed


def take(free: list[int], count: int) -> list[int] | None:
    """Take places on so many different GPUs, the least busy first; None: they are not there."""
    gpus = sorted(set(free), key=lambda gpu: (-free.count(gpu), gpu))[:count]
    if len(gpus) < count:
        return None
    for gpu in gpus:
        free.remove(gpu)
    return gpus


def build_tiny(folder: Path) -> Path:
    """Write a random model of the demo's depth, of no width, with its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from softrag.base_models import resolve_base_model

    base = resolve_base_model("smollm2-135m-instruct")
    config = AutoConfig.from_pretrained(
        base,
        hidden_size=18,
        intermediate_size=16,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder.absolute()


def main() -> int:
    """Carry out a plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--together", type=int, default=1, help="runs at a time on each GPU")
    parser.add_argument("--texts", nargs="+", default=[], help="what {texts} stands for")
    parser.add_argument("--questions", nargs="+", default=[], help="what {questions} stands for")
    parser.add_argument("--qa-dev", nargs="+", default=[], help="what {dev} stands for, scored on")
    parser.add_argument("--start", default="softrag-demo", help="what {start} stands for")
    parser.add_argument("--limit", type=int, default=300, help="questions scored of each set")
    parser.add_argument(
        "--as-given",
        action="store_true",
        help="score with documents in the files' order, for files that have the nearest first "
        "already or machines without the embedder",
    )
    parser.add_argument("--only", nargs="+", help="these runs, and what they need")
    parser.add_argument("--seed", type=int, help="of the runs of --only, as new runs NAME@SEED")
    parser.add_argument("--stop-after", type=float, help="start nothing that ends after MINUTES")
    parser.add_argument("--dry", action="store_true", help="two steps each, on a tiny model")
    options = parser.parse_args()
    runs = read_plan(options.plan)
    if options.only:
        runs = choose(runs, options.only, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    revision = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    machine = Machine(
        out=options.out,
        files={
            "texts": options.texts,
            "questions": options.questions,
            "dev": options.qa_dev,
            "start": [options.start],
        },
        limit=options.limit if not options.dry else 2,
        tiny=build_tiny(options.out / "tiny") if options.dry else None,
        commit=subprocess.run(revision, capture_output=True, text=True, check=False).stdout.strip(),
        as_given=options.as_given,
    )
    return 0 if carry_out(runs, machine, options.gpus, options.together, options.stop_after) else 1


def choose(runs: dict[str, Planned], names: Sequence[str], seed: int | None) -> dict[str, Planned]:
    """Return these runs, with another seed if one is given, and the runs they need."""
    chosen = {name: runs[name] for name in names}
    wanted = set().union(*(needs(run, runs) for run in chosen.values()))
    if seed is not None:
        chosen = {
            f"{name}@{seed}": replace(run, name=f"{name}@{seed}", seed=seed)
            for name, run in chosen.items()
        }
    while missing := wanted - set(chosen):
        chosen = {name: runs[name] for name in missing} | chosen
        wanted = set().union(*(needs(run, runs) for run in chosen.values()))
    return chosen


if __name__ == "__main__":
    sys.exit(main())
