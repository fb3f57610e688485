r"""`python -m softrag_trainers pretrain|finetune|label KEY=VALUE...`: train from the command line.

    python -m softrag_trainers pretrain out_dir=runs/pretrained data.train=[texts.jsonl]
    python -m softrag_trainers finetune model=runs/pretrained out_dir=runs/model \
        data.train=[questions.jsonl] data.validation=[dev.jsonl]
    python -m softrag_trainers label task=answers data=[questions.jsonl] out=answered.jsonl \
        teacher=http://localhost:8000/v1

`recipe=demo|pisco|oscar` chooses shipped values. With several devices: `accelerate launch -m
softrag_trainers ...`.
"""

from __future__ import annotations

import logging
import sys

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from softrag.errors import SoftRAGError

USAGE = "usage: python -m softrag_trainers {pretrain,finetune,label} [KEY=VALUE ...]"


def main(arguments: list[str]) -> int:
    """Run a stage; return the exit code: 0 done, 1 failed, 2 misused."""
    if not arguments or arguments[0] not in ("pretrain", "finetune", "label"):
        sys.stderr.write(f"{USAGE}\n")
        return 2
    from softrag_trainers import labelling, runs
    from softrag_trainers.options import read_options

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    stage, overrides = arguments[0], arguments[1:]
    try:
        options = read_options(stage, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        sys.stderr.write(f"{error}\n{USAGE}\n")
        return 2
    try:
        if stage == "label":
            labelling.label(options)
        else:
            runs.pretrain(options) if stage == "pretrain" else runs.finetune(options)
    except (SoftRAGError, ValueError, OSError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
