"""What training promises: who learns, from what, and what stops it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from softrag.adapters import is_lora_weight, multiplying_once
from softrag.batch import IGNORED
from softrag.model import SoftRAGModel
from softrag.prompt import encode_text
from softrag_trainers.collators import Lesson, MemoryCollator
from softrag_trainers.examples import QuestionRow
from softrag_trainers.finetuning import FineTuningCollator, Rows
from softrag_trainers.options import Optimizer, PretrainingData, Run
from softrag_trainers.pretraining import PretrainingCollator, TextPieces
from softrag_trainers.runs import score_questions
from softrag_trainers.trainer import SoftRAGTrainer, cpu_threads
from softrag_trainers.watches import DivergedError
from tests.checkpoints import build_model
from tests.trainers.tiny import question_rows, text_rows

LORA = {"r": 4, "alpha": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "separate": {"compressor_layers": 1},
    "compressor_lora": {"compressor_lora": LORA},
    "shared": {"compressor": "shared", "compressor_lora": LORA, "connector_hidden": None},
    "standardized": {"connector": "standardized", "readout": "pooled"},
    "frozen_decoder": {"decoder_lora": None, "readout": "memory"},
}


def finetuning(model: SoftRAGModel, **options: Any) -> FineTuningCollator:
    return FineTuningCollator(
        model.config, model.compressor_tokenizer, model.decoder_tokenizer, **options
    )


def pretraining(model: SoftRAGModel, **options: Any) -> PretrainingCollator:
    return PretrainingCollator(
        model.config, model.compressor_tokenizer, model.decoder_tokenizer, **options
    )


def pieces_for(collator: PretrainingCollator) -> TextPieces:
    data = PretrainingData(min_chunk_tokens=8, max_chunk_tokens=24, chunks=2)
    return TextPieces(text_rows(), collator.document_prompt, data, seed=0)


def build_trainer(
    out_dir: Path,
    model: SoftRAGModel,
    *,
    optimizer: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    collator: MemoryCollator | None = None,
    train_rows: Any = None,
    eval_rows: Sequence[QuestionRow] | None = None,
    score: Callable[[SoftRAGModel], dict[str, float]] | None = None,
) -> SoftRAGTrainer:
    options: dict[str, Any] = {"batch_size": 4, "steps": 2, "warmup": 0.0}
    return SoftRAGTrainer(
        model,
        options=Optimizer(**options | (optimizer or {})),
        run=Run(**{"bf16": False, "log_every": 1} | (run or {})),
        out_dir=out_dir,
        collator=collator or finetuning(model),
        train_rows=train_rows or Rows(question_rows()),
        eval_rows=None if eval_rows is None else Rows(eval_rows),
        score=score,
    )


def weights(model: SoftRAGModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def logged(trainer: SoftRAGTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trained_weight_learns_and_no_frozen_one_moves(tmp_path: Path, variant: str) -> None:
    model = build_model(**VARIANTS[variant])
    collator = pretraining(model, continuation=0)
    before = weights(model)

    build_trainer(tmp_path, model, collator=collator, train_rows=pieces_for(collator)).train()

    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == model.learned_names()


def test_questions_are_learned_and_the_speed_is_logged(tmp_path: Path) -> None:
    model = build_model()
    rates = {"compressor_lr": 5e-3, "connector_lr": 5e-3, "decoder_lr": 5e-3}
    trainer = build_trainer(tmp_path, model, optimizer={"steps": 30, **rates})

    trainer.train()

    losses = logged(trainer, "loss")
    assert losses[-1] < 0.7 * losses[0]
    assert all(speed > 0 for speed in logged(trainer, "tokens_per_second"))
    # The first steps, which compile, are not counted.
    assert len(logged(trainer, "tokens_per_second")) == 25


def test_a_part_whose_learning_rate_is_0_stays_as_it_is_and_takes_no_gradients(
    tmp_path: Path,
) -> None:
    model = build_model(readout="words")
    before = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    fingerprint = model.fingerprint
    rates = {"compressor_lr": 0.0, "connector_lr": 0.0, "decoder_lr": 1e-2}

    build_trainer(tmp_path, model, optimizer={"steps": 2, "weight_decay": 0.1, **rates}).train()

    changed = {n for n, t in model.trained_state().items() if not torch.equal(t, before[n])}
    assert changed == {name for name in before if name.startswith("decoder.")}
    assert model.fingerprint == fingerprint
    assert all(
        parameter.grad is None and not parameter.requires_grad
        for name, parameter in model.named_parameters()
        if not name.startswith("decoder.")
    )


def test_a_rerank_head_learns_which_document_is_gold(tmp_path: Path) -> None:
    model = build_model(query_dependent=True, rerank=True)
    rates = {"compressor_lr": 5e-3, "connector_lr": 5e-3, "decoder_lr": 0.0}
    rows = question_rows()
    trainer = build_trainer(
        tmp_path,
        model,
        optimizer={"batch_size": 8, "steps": 20, "rerank_weight": 1.0, **rates},
        run={"gradient_checkpointing": True},
    )
    before = score_questions(model.eval(), rows, batch_size=3, max_new_tokens=1)

    trainer.train()

    after = score_questions(model.eval(), rows, batch_size=3, max_new_tokens=1)
    assert after["rerank_accuracy"] == after["rerank_mrr"] == 100
    assert before["rerank_mrr"] < 100


def added_by(weight: str, model: SoftRAGModel, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return what a weight of 0.5 adds to the summed loss of a batch, and the batch."""
    collator = finetuning(model, saying=True)
    batch = collator(question_rows())
    without, with_it = (
        build_trainer(folder, model, optimizer={weight: value}, collator=collator).compute_loss(
            model, dict(batch)
        )
        for value in (0.0, 0.5)
    )
    return (with_it - without) * (batch["labels"] != IGNORED).sum(), batch


def read_off(model: SoftRAGModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what the decoder's head reads off the soft tokens of a batch."""
    documents = ("compressor_input_ids", "compressor_attention_mask", "document_index")
    soft_tokens = model.line_up_soft_tokens(*(batch[name] for name in documents))
    return model.decoder.get_output_embeddings()(soft_tokens)


@torch.no_grad()
def test_the_relevance_of_a_document_weighs_as_told(tmp_path: Path) -> None:
    model = build_model(query_dependent=True, rerank=True)

    added, batch = added_by("rerank_weight", model, tmp_path)

    scores = model(**{k: t for k, t in batch.items() if k != "relevance"}).scores
    expected = nn.functional.binary_cross_entropy_with_logits(
        scores, batch["relevance"], reduction="sum"
    )
    assert added.item() == pytest.approx((0.5 * expected).item(), rel=1e-4)


@torch.no_grad()
def test_what_soft_tokens_say_by_themselves_weighs_as_told(tmp_path: Path) -> None:
    model = build_model(query_dependent=True)

    added, batch = added_by("saying_weight", model, tmp_path)

    expected = nn.functional.cross_entropy(
        read_off(model, batch), batch["soft_token_labels"], reduction="sum"
    )
    assert added.item() == pytest.approx((0.5 * expected).item(), rel=1e-4)


@torch.no_grad()
def test_what_soft_tokens_say_of_their_documents_weighs_as_told(tmp_path: Path) -> None:
    model = build_model(rate=8)

    added, batch = added_by("saying_weight", model, tmp_path)

    said = read_off(model, batch).log_softmax(-1)
    expected = torch.zeros(())
    for scores, words in zip(said, batch["soft_token_labels"], strict=True):
        known = words[words != IGNORED]
        assert len(known) > 1
        expected -= scores[known].mean()
    # Each of the 16 documents is counted, though they are five.
    assert len(batch["document_index"]) == 16
    assert len(batch["compressor_input_ids"]) < 8
    assert added.item() == pytest.approx((0.5 * expected).item(), rel=1e-4)


def test_saying_weight_wants_a_collator_that_says_what(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"saying_weight is 0\.5, but the collator .*saying=True"):
        build_trainer(tmp_path, build_model(), optimizer={"saying_weight": 0.5})


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_soft_tokens_say_the_answer_by_themselves_only_if_they_are_taught_to(
    tmp_path: Path, weight: float
) -> None:
    model = build_model(query_dependent=True)
    rates = {"compressor_lr": 2e-2, "connector_lr": 2e-2, "decoder_lr": 0.0}
    collator = finetuning(model, saying=True)
    batch = collator(question_rows())
    optimizer = {"steps": 100, "saying_weight": weight, **rates}
    trainer = build_trainer(tmp_path, model, optimizer=optimizer, collator=collator)

    trainer.train()

    with torch.no_grad():
        said = read_off(model.eval(), batch).argmax(-1)
    known = batch["soft_token_labels"] != IGNORED
    right = (said == batch["soft_token_labels"])[known].float().mean()
    assert right > 0.4 if weight else right < 0.1


def test_adapted_layers_that_multiply_once_compute_and_learn_the_same() -> None:
    model = build_model(compressor="shared", compressor_lora={"r": 4, "alpha": 8})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_lora_weight(name):
                parameter.normal_(std=0.1)
    batch = finetuning(model)(question_rows())

    def learned() -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return loss.item(), gradients

    thrice, expected = learned()
    with multiplying_once(model):
        once, gradients = learned()

    assert learned()[0] == thrice
    assert once == pytest.approx(thrice, rel=1e-5)
    assert set(gradients) == set(expected)
    assert sum(is_lora_weight(name) for name in expected) > 20
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-6)


def test_lessons_weigh_the_same_however_long_their_answers_are_if_told_so(tmp_path: Path) -> None:
    model = build_model()
    short, long = question_rows()[:2]
    rows = [short, replace(long, answers=("William Shakespeare, in the year 1599 or 1600",))]
    collator = finetuning(model)

    def loss(rows: list[QuestionRow], loss_per: str) -> float:
        trainer = build_trainer(tmp_path, model, optimizer={"loss_per": loss_per})
        with torch.no_grad():
            return float(trainer.compute_loss(model, collator(rows)))

    alone = [loss([row], "token") for row in rows]
    lengths = [int((collator([row])["labels"] != IGNORED).sum()) for row in rows]
    by_length = sum(a * n for a, n in zip(alone, lengths, strict=True)) / sum(lengths)
    assert loss(rows, "token") == pytest.approx(by_length, rel=1e-5)
    assert loss(rows, "lesson") == pytest.approx(sum(alone) / 2, rel=1e-5)
    roots = [length**0.5 for length in lengths]
    by_root = sum(a * root for a, root in zip(alone, roots, strict=True)) / sum(roots)
    assert loss(rows, "root") == pytest.approx(by_root, rel=1e-5)
    assert by_length != pytest.approx(by_root, rel=1e-3)
    # Batches are added up with the same weights.
    accumulated = {"loss_per": "lesson", "batch_size": 1, "accumulation": 2, "steps": 1}
    trainer = build_trainer(tmp_path, model, optimizer=accumulated, train_rows=Rows(rows))
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(sum(alone) / 2, rel=1e-4)

    expected = "loss_per is 'answer'; expected 'token', 'root' or 'lesson'"
    with pytest.raises(ValueError, match=expected):
        loss(rows, "answer")


@pytest.mark.parametrize(
    ("optimizer", "run"),
    [
        ({"batch_size": 1, "accumulation": 4}, {}),
        ({"batch_size": 2, "accumulation": 2}, {}),
        ({}, {"gradient_checkpointing": True}),
        ({}, {"workers": 2}),
    ],
)
def test_how_a_batch_is_worked_through_does_not_change_what_is_learned(
    tmp_path: Path, optimizer: dict, run: dict
) -> None:
    results = []
    for options, kind in (({}, {}), (optimizer, run)):
        model = build_model(query_dependent=True, rerank=True)
        collator = finetuning(model, min_documents=1, text_share=0.3)
        trainer = build_trainer(
            tmp_path, model, optimizer={"steps": 3, **options}, run=kind, collator=collator
        )
        trainer.train()
        results.append((logged(trainer, "loss"), logged(trainer, "grad_norm"), model))

    (losses, norms, model), (other_losses, other_norms, other) = results
    assert other_losses == pytest.approx(losses, rel=1e-4)
    assert other_norms == pytest.approx(norms, rel=1e-3)
    expected = model.trained_state()
    for name, value in other.trained_state().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("workers", [0, 1])
def test_every_epoch_makes_its_own_random_choices(tmp_path: Path, workers: int) -> None:
    class CountsEpochs(FineTuningCollator):
        def lesson(self, row: QuestionRow) -> Lesson:
            # What is learned tells the epoch, from whichever process this is.
            document = self.document_prompt.render(row.documents[0])
            prompt = self.rag_prompt.render("?", [document.n_memory], "x" * (1 + self.epoch))
            return Lesson([document], prompt)

    model = build_model()
    collator = CountsEpochs(model.config, model.compressor_tokenizer, model.decoder_tokenizer)
    trainer = build_trainer(
        tmp_path, model, optimizer={"steps": 6}, run={"workers": workers}, collator=collator
    )
    learned = []
    original = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
        learned.append(inputs["labels"][inputs["labels"] != IGNORED].tolist())
        return original(model, inputs, **options)

    trainer.compute_loss = compute_loss
    trainer.train()

    answers = [
        [*encode_text(collator.decoder_tokenizer, "x" * n), collator.rag_prompt.end_id] * 4
        for n in (1, 1, 2, 2, 3, 3)
    ]
    assert learned == answers


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    def trainer_of(model: SoftRAGModel) -> SoftRAGTrainer:
        # Two steps are an epoch: the checkpoint of step 3 is in the middle of the second.
        collator = finetuning(model, min_documents=1, text_share=0.5)
        return build_trainer(
            tmp_path, model, optimizer={"steps": 6}, run={"save_every": 3}, collator=collator
        )

    whole = build_model()
    trainer = trainer_of(whole)
    trainer.train()
    resumed = build_model(seed=1)
    again = trainer_of(resumed)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    assert logged(again, "loss") == logged(trainer, "loss")
    expected = whole.trained_state()
    for name, value in resumed.trained_state().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_batch(tmp_path: Path) -> None:
    model = build_model()
    poison = model.decoder_tokenizer.convert_tokens_to_ids("Z")
    with torch.no_grad():
        model.decoder.get_input_embeddings().weight[poison] = math.nan
    rows = question_rows()
    rows[5] = replace(rows[5], question="Z?")
    trainer = build_trainer(
        tmp_path,
        model,
        optimizer={"batch_size": 1, "steps": 8},
        run={"save_every": 1},
        train_rows=Rows(rows),
    )

    with pytest.raises(DivergedError, match=r"loss is nan.*diverged_batch\.safetensors"):
        trainer.train()

    batch = load_file(tmp_path / "diverged_batch.safetensors")
    assert poison in batch["decoder_input_ids"]
    assert set(batch) >= {"labels", "compressor_input_ids", "document_index"}
    # The last checkpoint is from before the step that made every weight a NaN.
    steps = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert steps == list(range(1, trainer.state.global_step))
    last = tmp_path / f"checkpoint-{steps[-1]}" / "model.safetensors"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(last).values())


def test_an_evaluation_measures_true_shuffled_and_no_memories(tmp_path: Path) -> None:
    model = build_model()
    collator = finetuning(model)
    trainer = build_trainer(tmp_path, model, collator=collator, eval_rows=question_rows())

    metrics = trainer.evaluate()

    with torch.no_grad():
        expected = model(**collator(question_rows())).loss.item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    losses = {metrics[f"eval_loss{kind}"] for kind in ("", "_shuffled", "_without")}
    assert len(losses) == 3
    assert logged(trainer, "eval_loss") == [metrics["eval_loss"]]


def test_rows_without_memories_have_one_loss_three_times(tmp_path: Path) -> None:
    model = build_model()
    collator = finetuning(model, text_share=1.0)

    metrics = build_trainer(
        tmp_path, model, collator=collator, eval_rows=question_rows()
    ).evaluate()

    assert metrics["eval_loss"] == metrics["eval_loss_shuffled"] == metrics["eval_loss_without"]


def test_evaluations_see_the_same_choices_and_leave_training_as_it_was(tmp_path: Path) -> None:
    model = build_model()
    collator = finetuning(model, min_documents=1, text_share=0.5)
    evaluated = build_trainer(
        tmp_path,
        model,
        optimizer={"steps": 4, "connector_lr": 0.0, "compressor_lr": 0.0, "decoder_lr": 0.0},
        run={"eval_every": 1},
        collator=collator,
        eval_rows=question_rows(),
        score=lambda trained: {"training": float(trained.training)},
    )
    evaluated.train()
    plain = build_trainer(
        tmp_path,
        build_model(),
        optimizer={"steps": 4, "connector_lr": 0.0, "compressor_lr": 0.0, "decoder_lr": 0.0},
        collator=finetuning(model, min_documents=1, text_share=0.5),
    )
    plain.train()

    assert len(set(logged(evaluated, "eval_loss"))) == 1
    assert logged(evaluated, "eval_training") == [0.0] * 4
    assert logged(evaluated, "loss") == logged(plain, "loss")
    assert model.training


def test_each_part_has_its_learning_rate_and_vectors_do_not_decay(tmp_path: Path) -> None:
    model = build_model()
    rates = {"compressor_lr": 1e-4, "connector_lr": 2e-4, "decoder_lr": 3e-4}
    trainer = build_trainer(tmp_path, model, optimizer={**rates, "weight_decay": 0.1})

    groups = trainer.create_optimizer().param_groups

    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    named = dict(model.named_parameters())
    assert len(found) == len(model.trained_state())
    for name, expected in {
        "compressor.layers.0.mlp.up_proj.weight": (1e-4, 0.1),
        "compressor.norm.weight": (1e-4, 0.0),
        "connector.up.weight": (2e-4, 0.1),
        "connector.up.bias": (2e-4, 0.0),
        "memory_embedding": (2e-4, 0.0),
        "auto_encoding_embedding": (2e-4, 0.0),
        "decoder.model.layers.0.mlp.up_proj.lora_A.default.weight": (3e-4, 0.1),
    }.items():
        assert found[id(named[name])] == expected, name


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (0.0, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]),
        (0.2, [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0]),
    ],
)
def test_the_learning_rate_rises_and_falls_in_straight_lines(
    tmp_path: Path, warmup: float, expected: list[float]
) -> None:
    trainer = build_trainer(tmp_path, build_model(), optimizer={"steps": 10, "warmup": warmup})
    trainer.create_optimizer()

    factor = trainer.create_scheduler(10).lr_lambdas[0]

    assert [factor(step) for step in range(11)] == pytest.approx(expected)


def test_a_run_ends_decayed_when_its_minutes_are_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A clock by which every step takes a second, however busy the machine is.
    clock = SimpleNamespace(monotonic=count().__next__, perf_counter=time.perf_counter)
    monkeypatch.setattr("softrag_trainers.watches.time", clock)
    trainer = build_trainer(
        tmp_path, build_model(), optimizer={"steps": 100_000, "minutes": 5 / 60}
    )

    trainer.train()

    # The first step starts the clock; a rate is set at the end of the step before, by the time
    # when the one before that ended.
    assert trainer.state.global_step == 5
    rates = [0.0005 * share for share in (1.0, 1.0, 0.8, 0.6, 0.4)]
    assert logged(trainer, "learning_rate") == pytest.approx(rates, rel=1e-3)


@pytest.mark.parametrize(("count", "inside"), [(1, 1), (None, 3)])
def test_the_cpu_computes_with_few_threads_only_as_long_as_told(
    count: int | None, inside: int
) -> None:
    with cpu_threads(3):
        with cpu_threads(count):
            assert torch.get_num_threads() == inside
        assert torch.get_num_threads() == 3
