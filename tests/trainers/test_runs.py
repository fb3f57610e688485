"""`python -m softrag_trainers`, from files to saved models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from softrag.batch import collate_documents
from softrag.prompt import DocumentPrompt
from softrag_trainers.options import read_options
from softrag_trainers.runs import finetune
from tests.trainers.tiny import question_records, tiny_arch, write_lines

ROOT = Path(__file__).parents[2]
SHORT = [
    "optimizer.batch_size=4",
    "optimizer.steps=2",
    "run.log_every=1",
    "data.max_new_tokens=4",
]


@pytest.fixture
def questions(tmp_path: Path) -> str:
    return str(write_lines(tmp_path / "questions.jsonl", question_records()))


def logged(folder: Path, name: str) -> list[float]:
    """Return what a run logged under a name, in order."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def test_a_run_in_bf16_scores_generated_answers_while_and_after_it_trains(
    tmp_path: Path, questions: str
) -> None:
    options = read_options(
        "finetune",
        [
            *tiny_arch(),
            *SHORT,
            f"out_dir={tmp_path / 'model'}",
            f"data.train=[{questions}]",
            f"data.validation=[{questions}]",
            "run.bf16=true",
            "run.eval_every=1",
        ],
    )

    model = finetune(options)

    for name in ("loss", "loss_shuffled", "loss_without", "em", "f1", "match", "rouge_l"):
        values = logged(tmp_path / "model", f"eval_{name}")
        assert len(values) == 3, name
        assert all(map(math.isfinite, values)), name
    # The model that is returned answers outside autocast too.
    prompt = DocumentPrompt.from_config(model.config, model.compressor_tokenizer)
    assert model.decoder.dtype == torch.bfloat16
    with torch.no_grad():
        model.decoder(input_ids=torch.arange(5)[None])
        model.compress(*collate_documents([prompt.render("Paris.")], 0))
