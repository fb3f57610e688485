"""EM, F1 and match of a checkpoint on question sets, with bootstrap intervals.

    python benchmarks/score.py CHECKPOINT QUESTIONS.jsonl… --json FILE [--modes memory text]

Documents are read nearest to the question first, as a search would return them.
The file is written anew after every set: what is there stays when time runs out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from softrag.comparison import Bootstrap, LoadedModel, answer_rows
from softrag.embedder import default_embedder
from softrag.evaluation import read_questions
from softrag.question_set import nearest_first

METRICS = ("em", "f1", "match")


def score(
    checkpoint: str,
    files: list[Path],
    json_file: Path,
    *,
    modes: list[str],
    limit: int,
    batch_size: int,
    dtype: str = "auto",
    rate: int | None = None,
    as_given: bool = False,
    copy_bias: float | None = None,
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return `[mean, low, high]` by set, mode and metric, in percent."""
    model = LoadedModel.from_pretrained(checkpoint, batch_size=batch_size, dtype=dtype, rate=rate)
    embedder = default_embedder()  # It loads its model when it is first asked to embed.
    scores: dict[str, dict[str, dict[str, list[float]]]] = {}
    for file in files:
        questions = read_questions(file, limit)
        if not as_given and set(modes) != {"closed"}:
            questions = nearest_first(questions, embedder)
        bootstrap = Bootstrap(len(questions))
        by_mode = scores.setdefault(file.name.split(".jsonl")[0], {})
        rows = answer_rows(
            questions,
            model,
            modes=modes,
            batch_size=batch_size,
            embedder=embedder,
            copy_bias=copy_bias,
        )
        for row in rows:
            by_mode[row.mode] = {
                metric: [round(x, 2) for x in bootstrap.interval(row.scores[metric])]
                for metric in METRICS
            } | {"prompt_tokens": [round(float(row.prompt_tokens.mean()), 1)]}
            print(file.name, row.mode, by_mode[row.mode], flush=True)
        json_file.write_text(json.dumps(scores, indent=1) + "\n")
    return scores


def main() -> None:
    """Score a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--modes", nargs="+", default=["memory"])
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=320)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rate", type=int, help="One of the checkpoint's; its own unless told.")
    parser.add_argument(
        "--as-given",
        action="store_true",
        help="Read documents in the file's order; needs no embedder but in mode excerpts.",
    )
    parser.add_argument("--copy-bias", type=float, help="The checkpoint's unless told.")
    options = parser.parse_args()
    score(
        options.checkpoint,
        options.files,
        options.json,
        modes=options.modes,
        limit=options.limit,
        batch_size=options.batch_size,
        dtype=options.dtype,
        rate=options.rate,
        as_given=options.as_given,
        copy_bias=options.copy_bias,
    )


if __name__ == "__main__":
    main()
