"""Rates that rise with a run: which, when, and for whom."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from softrag.config import SoftRAGConfig
from softrag.model import SoftRAGModel
from softrag_trainers.__main__ import main
from softrag_trainers.curriculum import Curriculum
from softrag_trainers.examples import QuestionRow
from softrag_trainers.finetuning import FineTuningCollator, Rows
from softrag_trainers.options import Optimizer, Run
from softrag_trainers.pretraining import PretrainingCollator, TextPiece
from softrag_trainers.trainer import SoftRAGTrainer
from tests.checkpoints import build_model
from tests.trainers.tiny import (
    question_records,
    question_rows,
    text_records,
    tiny_arch,
    write_lines,
)


def collator_for(model: SoftRAGModel) -> FineTuningCollator:
    parts = (model.config, model.compressor_tokenizer, model.decoder_tokenizer)
    return FineTuningCollator(*parts, replay=PretrainingCollator(*parts, continuation=0))


def trainer_for(
    folder: Path,
    model: SoftRAGModel,
    rows: Sequence[QuestionRow],
    *,
    steps: int,
    run: dict[str, Any] | None = None,
    **optimizer: Any,
) -> SoftRAGTrainer:
    return SoftRAGTrainer(
        model,
        options=Optimizer(batch_size=4, steps=steps, **{"curriculum": 0.5} | optimizer),
        run=Run(**{"bf16": False, "log_every": 1} | (run or {})),
        out_dir=folder,
        collator=collator_for(model),
        train_rows=Rows(rows),
        eval_rows=Rows(question_rows()) if run and "eval_every" in run else None,
    )


def rates_of(model: SoftRAGModel, batch: dict[str, torch.Tensor]) -> set[int]:
    """Return the rates that explain how many soft tokens the documents of a batch have."""
    is_memory = batch["compressor_input_ids"] == model.memory_ids[0]
    memories = is_memory.sum(1).tolist()
    # Less bos.
    lengths = (batch["compressor_attention_mask"].sum(1) - is_memory.sum(1) - 1).tolist()
    found = set()
    for length, n_memory in zip(lengths, memories, strict=True):
        (rate,) = (rate for rate in (2, 4, 8, 16) if -(-length // rate) == n_memory)
        found.add(rate)
    return found


def learned(trainer: SoftRAGTrainer, resume_from: Path | None = None) -> list[set[int]]:
    """Train, and return the rates of every batch that is learned."""
    rates, original = [], trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
        rates.append(rates_of(trainer.bare_model, inputs))
        return original(model, inputs, **options)

    trainer.compute_loss = compute_loss
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return rates


def drawn(
    rate: int, share: float, shares: Sequence[float], rates: list[int] | None = None
) -> Iterator[list[int]]:
    curriculum = Curriculum(SoftRAGConfig(rate=rate, rates=rates), share)
    for curriculum.done in shares:
        yield curriculum.rates()


def test_the_rate_doubles_from_two_to_the_models_and_stages_overlap() -> None:
    assert list(drawn(16, 0.5, [tenth / 10 for tenth in range(11)])) == [
        [2], [2, 4], [4], [4, 8], [8], [16], [16], [16], [16], [16], [16],
    ]  # fmt: skip
    assert list(drawn(16, 0.5, [0.08, 0.09, 0.16, 0.17, 0.45, 0.499])) == [
        [2], [2, 4], [2, 4], [4], [8, 16], [8, 16],
    ]  # fmt: skip


def test_of_several_rates_those_that_were_reached_stay() -> None:
    assert list(drawn(16, 0.5, [tenth / 10 for tenth in range(6)], rates=[4, 16])) == [
        [2], [2, 4], [4], [4, 8], [4, 8], [4, 16],
    ]  # fmt: skip
    # Whichever of them the model is asked at.
    assert list(drawn(4, 1.0, [0.0, 0.5, 0.9, 1.0], rates=[4, 16])) == [
        [2], [4, 8], [4, 8, 16], [4, 16],
    ]  # fmt: skip


def test_rates_between_the_powers_of_two_have_stages_of_their_own() -> None:
    curriculum = Curriculum(SoftRAGConfig(rate=6, rates=[6, 12]), 1.0)

    assert curriculum.stages == [2, 4, 6, 8, 12]
    curriculum.done = 1.0
    assert curriculum.rates() == [6, 12]


@pytest.mark.parametrize(
    ("rate", "stages"),
    [(1, [1]), (2, [2]), (3, [2, 3]), (4, [2, 4]), (12, [2, 4, 8, 12]), (16, [2, 4, 8, 16])],
)
def test_the_stages_are_powers_of_two_and_then_the_rate(rate: int, stages: list[int]) -> None:
    curriculum = Curriculum(SoftRAGConfig(rate=rate), 1.0)

    assert curriculum.stages == stages
    assert curriculum.rates() == stages[:1]
    curriculum.done = 1.0
    assert curriculum.rates() == [rate]


@pytest.mark.parametrize(
    ("changes", "share", "message"),
    [
        ({}, 1.5, r"curriculum is 1\.5; expected a share of the run"),
        ({}, -0.1, r"curriculum is -0\.1; expected a share of the run"),
        ({"memory_tokens": 8}, 0.5, r"8 soft tokens .*Set arch\.memory_tokens=null, or"),
    ],
)
def test_what_has_no_rate_to_rise_is_refused(changes: dict, share: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curriculum(SoftRAGConfig(**changes), share)


def test_questions_and_texts_between_them_are_drawn_at_the_same_rates() -> None:
    model = build_model(rate=16)
    collator = collator_for(model)
    collator.curriculum = Curriculum(model.config, 0.5)
    texts = [TextPiece(([*range(20 + n, 52 + n)],)) for n in range(30)]
    questions = question_rows() * 2

    for collator.curriculum.done, expected in ((0.0, {2}), (0.1, {2, 4}), (0.5, {16})):
        assert rates_of(model, collator(questions)) == expected
        assert rates_of(model, collator(texts)) == expected
    collator.curriculum = None
    assert rates_of(model, collator([*questions, *texts])) == {16}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_learns_at_rising_rates_and_is_measured_at_the_models(
    tmp_path: Path, workers: int
) -> None:
    model = build_model(rate=4)
    run = {"workers": workers, "eval_every": 1}
    trainer = trainer_for(tmp_path, model, question_rows() * 20, steps=40, run=run)
    measured: list[set[int]] = []
    original = trainer._eval_batches

    def eval_batches(rows: Any) -> Iterator[dict[str, torch.Tensor]]:
        for batch in original(rows):
            measured.append(rates_of(model, batch))
            yield batch

    trainer._eval_batches = eval_batches
    rates = learned(trainer)

    # Batches are made a few steps before they are learned.
    assert rates[:10] == [{2}] * 10
    assert {2, 4} in rates
    assert rates[-10:] == [{4}] * 10
    assert measured == [{4}] * 80


def test_a_resumed_run_goes_on_at_its_share(tmp_path: Path) -> None:
    rows = question_rows() * 4
    trainer = trainer_for(tmp_path, build_model(rate=4), rows, steps=8, run={"save_every": 4})

    assert learned(trainer)[:2] == [{2}, {2}]
    again = trainer_for(tmp_path, build_model(rate=4, seed=1), rows, steps=8)
    assert learned(again, tmp_path / "checkpoint-4") == [{4}] * 4


def test_the_rate_follows_the_minutes_where_they_end_first(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, build_model(), question_rows(), steps=100_000, minutes=0.5 / 60)

    trainer.train()

    assert trainer.collator.curriculum is not None
    assert trainer.collator.curriculum.done == 1.0


def test_a_trainer_without_a_curriculum_has_the_models_rate(tmp_path: Path) -> None:
    model = build_model(rate=4)

    assert learned(trainer_for(tmp_path, model, question_rows(), steps=2, curriculum=0.0)) == [
        {4}, {4},
    ]  # fmt: skip


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_both_stages_take_it_from_their_options(tmp_path: Path, stage: str) -> None:
    texts = write_lines(tmp_path / "texts.jsonl", text_records())
    questions = write_lines(tmp_path / "questions.jsonl", question_records())
    lessons = "data" if stage == "pretrain" else "replay"
    arguments = [
        *(stage, *tiny_arch(), "optimizer.curriculum=0.5", "optimizer.steps=4"),
        *("optimizer.batch_size=4", "run.log_every=1", f"{lessons}.min_chunk_tokens=8"),
        f"data.train=[{texts if stage == 'pretrain' else questions}]",
        *([] if stage == "pretrain" else [f"replay.train=[{texts}]"]),
    ]

    for options, rates in (([], None), (["data.rates=[3,4]"], [3, 4])):
        folder = tmp_path / f"model{len(options)}"
        assert main([*arguments, f"out_dir={folder}", *options]) == 0
        config = json.loads((folder / "config.json").read_text())
        assert (config["rate"], config["rates"]) == (4, rates)
