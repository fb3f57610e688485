"""How much of the gap between memories and text a router closes.

    python benchmarks/fallback.py answer CHECKPOINT QUESTIONS.jsonl… --out DIR [--limit 300]
    python benchmarks/fallback.py route DIR --json FILE

`answer` needs a GPU to be quick: it answers every file closed book, from text and from memories,
and writes `answers.json` (scores, answers, log-probabilities, texts) and `states.npz` (prompt
states). Documents are read nearest to the question first, as a search would return them. `route`
fits routers on one half of the questions of all files and tests them on the other half, on any
machine; it needs scikit-learn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from softrag.comparison import Bootstrap, LoadedModel, answer_rows, calibrate
from softrag.decoder import DecodeResult
from softrag.embedder import default_embedder
from softrag.evaluation import read_questions
from softrag.question_set import nearest_first, texts_of
from softrag.router import LOOKAHEAD

SEEDS = range(10)


def answer(
    checkpoint: str,
    files: list[Path],
    out: Path,
    *,
    limit: int,
    batch_size: int,
    dtype: str,
    rate: int | None,
    as_given: bool,
) -> None:
    """Answer the files and write what a router could look at."""
    out.mkdir(parents=True, exist_ok=True)
    started = perf_counter()
    model = LoadedModel.from_pretrained(checkpoint, batch_size=batch_size, dtype=dtype, rate=rate)
    embedder = default_embedder()
    answered = []
    states = []
    seconds = {"load": perf_counter() - started}
    for file in files:
        questions = read_questions(file, limit)
        if not as_given:
            questions = nearest_first(questions, embedder)
        began = perf_counter()
        rows = list(
            answer_rows(
                questions,
                model,
                modes=["closed", "text", "memory"],
                batch_size=batch_size,
                with_state=True,
                lookahead=LOOKAHEAD,
            )
        )
        seconds[file.name] = perf_counter() - began
        for place, question in enumerate(questions):
            answered.append(
                {
                    "id": question.id,
                    "source": file.name.split(".jsonl")[0],
                    "question": question.question,
                    "answers": question.answers,
                    "documents": texts_of(question),
                    **{
                        row.mode: {
                            "text": row.results[place].text,
                            "opening": row.results[place].opening,
                            "logprobs": [round(x, 4) for x in row.results[place].token_logprobs],
                            "prompt_tokens": row.results[place].prompt_tokens,
                            "finish_reason": row.results[place].finish_reason,
                            **{name: float(scores[place]) for name, scores in row.scores.items()},
                        }
                        for row in rows
                    },
                }
            )
        states += [result.prompt_state for result in rows[-1].results]
        for row in rows:
            means = {name: round(float(s.mean()), 1) for name, s in row.scores.items()}
            print(file.name, row.name, means, f"{row.decode_s:.4f} s", flush=True)
        # After every file: what is written stays when time runs out.
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        meta = {"checkpoint": checkpoint, "rate": rate, "limit": limit}
        meta |= {"device": device, "seconds": seconds}
        (out / "answers.json").write_text(json.dumps({"meta": meta, "answered": answered}))
        np.savez(out / "states.npz", states=torch.stack(states).half().numpy())
    print(json.dumps(seconds), flush=True)


def route(folder: Path, file: Path) -> None:
    """Measure routers out of sample: what they look at, how far, and how much text they may use."""
    recorded = json.loads((folder / "answers.json").read_text())
    states = torch.from_numpy(np.load(folder / "states.npz")["states"]).float()
    answered = recorded["answered"]
    results = [_result(each["memory"], state) for each, state in zip(answered, states, strict=True)]
    memory, text, closed = (
        np.array([each[mode]["f1"] for each in answered]) for mode in ("memory", "text", "closed")
    )
    sources = np.array([each["source"] for each in answered])
    asked = {
        "questions": [each["question"] for each in answered],
        "texts": [each["documents"] for each in answered],
        "memory": memory,
        "text": text,
    }
    routers = [
        _measure(results, asked, sources, budget=0.2, with_state=state) for state in (True, False)
    ]
    budgets = [
        _measure(results, asked, sources, budget=budget, with_state=True) for budget in (0.1, 0.3)
    ]
    bootstrap = Bootstrap(len(answered))
    values = {
        "answers": recorded["meta"],
        "questions": len(answered),
        "f1": {
            name: list(bootstrap.interval(each))
            for name, each in (("closed", closed), ("memory", memory), ("text", text))
        },
        "text_better": float((text > memory).mean()),
        "memory_better": float((memory > text).mean()),
        "routers": routers,
        "budgets": budgets,
    }
    file.write_text(json.dumps(values, indent=1) + "\n")
    for each in routers + budgets:
        print({name: value for name, value in each.items() if name != "by_source"})


def _result(recorded: dict, state: torch.Tensor) -> DecodeResult:
    return DecodeResult(
        text=recorded["text"],
        prompt_tokens=recorded["prompt_tokens"],
        soft_tokens=0,
        completion_tokens=len(recorded["logprobs"]),
        first_token_s=0.0,
        finish_reason=recorded["finish_reason"],
        token_logprobs=recorded["logprobs"],
        prompt_state=state,
        opening=recorded["opening"],
    )


def _measure(
    results: list[DecodeResult],
    asked: dict,
    sources: np.ndarray,
    *,
    budget: float,
    with_state: bool,
) -> dict:
    """Return a router's worth, the mean over several ways to halve the questions."""
    runs = [
        calibrate(
            results,
            **asked,
            fingerprint="",
            budget=budget,
            with_state=with_state,
            seed=seed,
        )
        for seed in SEEDS
    ]
    memory, text = asked["memory"], asked["text"]
    shares = np.stack([run.from_text for run in runs]).mean(0)  # (questions,)
    return {
        "budget": budget,
        "lookahead": LOOKAHEAD,
        "with_state": with_state,
        "from_text": float(shares.mean()),
        "recovered_by_seed": [run.recovered.mean for run in runs],
        # One seed's halves, resampled: what another set of questions would have given.
        "recovered": list(runs[0].recovered),
        "routed_f1": list(runs[0].routed),
        "by_source": {
            source: {
                "memory": float(memory[sources == source].mean()),
                "text": float(text[sources == source].mean()),
                "routed": float((memory + shares * (text - memory))[sources == source].mean()),
                "from_text": float(shares[sources == source].mean()),
            }
            for source in dict.fromkeys(sources.tolist())
        },
    }


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("answer")
    first.add_argument("checkpoint")
    first.add_argument("files", nargs="+", type=Path)
    first.add_argument("--out", type=Path, required=True)
    first.add_argument("--limit", type=int, default=300)
    first.add_argument("--batch-size", type=int, default=320)
    first.add_argument("--dtype", default="auto")
    first.add_argument("--rate", type=int, help="One of the checkpoint's; its own unless told.")
    first.add_argument("--as-given", action="store_true", help="documents in the file's order")
    second = commands.add_parser("route")
    second.add_argument("folder", type=Path)
    second.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "answer":
        answer(
            options.checkpoint,
            options.files,
            options.out,
            limit=options.limit,
            batch_size=options.batch_size,
            dtype=options.dtype,
            rate=options.rate,
            as_given=options.as_given,
        )
    else:
        route(options.folder, options.json)


if __name__ == "__main__":
    main()
