"""How much of the gap between memories and text a router closes.

    python benchmarks/fallback.py answer CHECKPOINT QUESTIONS.jsonl… --out DIR [--limit 300]
    python benchmarks/fallback.py route DIR [--json FILE]

`answer` needs a GPU to be quick: it answers every file closed book, from text and from memories,
and writes `answers.json` (scores, answers, log-probabilities) and `states.npz` (prompt states).
`route` fits routers on one half of the questions and tests them on the other, on any machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from softrag.comparison import LoadedModel, answer_rows
from softrag.evaluation import read_questions


def answer(checkpoint: str, files: list[Path], out: Path, limit: int, batch_size: int) -> None:
    """Answer the files and write what a router could look at."""
    out.mkdir(parents=True, exist_ok=True)
    started = perf_counter()
    model = LoadedModel.from_pretrained(checkpoint, batch_size=batch_size)
    answered = []
    states = []
    seconds = {"load": perf_counter() - started}
    for file in files:
        began = perf_counter()
        questions = read_questions(file, limit)
        rows = list(
            answer_rows(
                questions,
                model,
                modes=["closed", "text", "memory"],
                batch_size=batch_size,
                with_state=True,
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
                    **{
                        row.mode: {
                            "text": row.results[place].text,
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
        meta = {"checkpoint": checkpoint, "limit": limit, "device": device, "seconds": seconds}
        (out / "answers.json").write_text(json.dumps({"meta": meta, "answered": answered}))
        np.savez(out / "states.npz", states=torch.stack(states).half().numpy())
    print(json.dumps(seconds), flush=True)


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
    options = parser.parse_args()
    if options.command == "answer":
        answer(options.checkpoint, options.files, options.out, options.limit, options.batch_size)


if __name__ == "__main__":
    main()
