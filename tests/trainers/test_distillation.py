"""What learning from a text-reading teacher promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch

from softrag.model import SoftRAGModel
from softrag_trainers.distillation import TextTeacher, recording
from softrag_trainers.examples import QuestionRow
from softrag_trainers.finetuning import FineTuningCollator, Rows
from softrag_trainers.options import Optimizer, Run
from softrag_trainers.trainer import SoftRAGTrainer
from tests.checkpoints import build_model
from tests.families import build_family
from tests.trainers.tiny import question_rows


@pytest.fixture
def teacher_folder(tmp_path: Path) -> Path:
    build_model(seed=7).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def collator_for(model: SoftRAGModel, **options: float) -> FineTuningCollator:
    tokenizers = model.compressor_tokenizer, model.decoder_tokenizer
    return FineTuningCollator(model.config, *tokenizers, teacher=True, **options)


def trainer_for(
    model: SoftRAGModel, teacher: Path, out_dir: Path, *, text_share: float = 0.0, **options: float
) -> SoftRAGTrainer:
    values = {"batch_size": 4, "steps": 20, "warmup": 0.0} | options
    return SoftRAGTrainer(
        model,
        options=Optimizer(**values),
        run=Run(bf16=False, log_every=1),
        out_dir=out_dir,
        collator=collator_for(model, text_share=text_share),
        train_rows=Rows(question_rows()),
        teacher=TextTeacher(teacher, model, dtype=torch.float32),
    )


def loss_of(
    trainer: SoftRAGTrainer, items: int | None = None, rows: list[QuestionRow] | None = None
) -> float:
    batch = trainer.collator(rows or question_rows())
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.bare_model, batch, num_items_in_batch=items))


def test_a_student_that_reads_what_its_own_teacher_reads_has_nothing_to_learn(
    teacher_folder: Path, tmp_path: Path
) -> None:
    same, other = build_model(seed=7), build_model(seed=8)
    options = {"text_share": 1.0, "distil_weight": 1.0}

    assert loss_of(trainer_for(same, teacher_folder, tmp_path, **options)) < 1e-6
    assert loss_of(trainer_for(other, teacher_folder, tmp_path, **options)) > 0.01
    # Memories are not the text, whoever reads them.
    assert loss_of(trainer_for(same, teacher_folder, tmp_path, distil_weight=1.0)) > 0.01


def test_the_teacher_and_the_labels_share_the_loss_as_told(
    teacher_folder: Path, tmp_path: Path
) -> None:
    student, teacher = build_model(seed=8), SoftRAGModel.from_pretrained(teacher_folder)
    batch = collator_for(student)(question_rows())
    own = {name: t for name, t in batch.items() if not name.startswith("teacher_")}
    names = ("input_ids", "attention_mask")
    text = {f"decoder_{name}": batch[f"teacher_{name}"] for name in names}
    with torch.no_grad():
        learned = student(**own)
        wanted = teacher(**text, labels=batch["teacher_labels"]).logits
    probabilities = wanted.softmax(-1)
    difference = wanted.log_softmax(-1) - learned.logits.log_softmax(-1)
    divergence = (probabilities * difference).sum(-1)  # one for each answer token

    for share in (0.0, 0.25, 1.0):
        trainer = trainer_for(student, teacher_folder, tmp_path, distil_weight=share)
        expected = (1 - share) * learned.loss + share * divergence.mean()
        assert loss_of(trainer) == pytest.approx(expected.item(), rel=1e-4)
        # Of an accumulated batch with twice the labels it is half of the loss.
        half = loss_of(trainer, items=2 * len(divergence))
        assert half == pytest.approx(expected.item() / 2, rel=1e-4)


def test_a_student_comes_nearer_to_a_teacher_that_does_not_move(
    teacher_folder: Path, tmp_path: Path
) -> None:
    student = build_model(seed=8)
    rates = {"compressor_lr": 5e-3, "connector_lr": 5e-3, "decoder_lr": 5e-3}
    trainer = trainer_for(student, teacher_folder, tmp_path, distil_weight=1.0, **rates)
    before = {name: tensor.clone() for name, tensor in trainer.teacher.model.state_dict().items()}

    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    for name, tensor in trainer.teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_teacher_of_other_prompts_or_tokens_is_refused(
    teacher_folder: Path, tmp_path: Path
) -> None:
    other_prompt, other_tokens = build_model(), build_model("Qwen3")
    other_prompt.config.rag_prompt = other_prompt.config.rag_prompt | {"system": "Be brief."}

    with pytest.raises(ValueError, match="has other prompt texts than the model"):
        TextTeacher(teacher_folder, other_prompt, dtype=torch.float32)
    with pytest.raises(ValueError, match="has other tokens than the model"):
        TextTeacher(teacher_folder, other_tokens, dtype=torch.float32)


def test_lessons_weigh_the_same_for_the_teacher_too(teacher_folder: Path, tmp_path: Path) -> None:
    student = build_model(seed=8)
    trainer = trainer_for(student, teacher_folder, tmp_path, loss_per="lesson", distil_weight=0.7)
    rows = [
        replace(row, answers=(answer,))
        for row, answer in zip(question_rows(), ("a", "a much longer answer, b"), strict=False)
    ]
    alone = [loss_of(trainer, rows=[row]) for row in rows]

    assert loss_of(trainer, rows=rows) == pytest.approx(fmean(alone), rel=1e-5)


def states_of(model: SoftRAGModel, ids: torch.Tensor, soft_tokens: torch.Tensor) -> torch.Tensor:
    """Return what the decoder's last layer makes of one prompt, before the norm behind it."""
    mask = torch.ones_like(ids)[None]
    backbone = model.decoder.base_model
    with torch.no_grad(), recording(backbone, [len(backbone.layers) - 1]) as states:
        model(ids[None], mask, soft_tokens=soft_tokens)
    return states[0][0]


def test_the_states_behind_the_documents_become_the_teachers(
    teacher_folder: Path, tmp_path: Path
) -> None:
    student, teacher = build_model(seed=8), SoftRAGModel.from_pretrained(teacher_folder)
    options = {"text_share": 0.3, "distil_weight": 0.0, "loss_per": "lesson"}
    labels_alone = trainer_for(student, teacher_folder, tmp_path, **options)
    with_states = trainer_for(student, teacher_folder, tmp_path, match_weight=3.0, **options)
    batch = labels_alone.collator(question_rows())
    with torch.no_grad():
        soft_tokens = student.line_up_soft_tokens(
            batch["compressor_input_ids"],
            batch["compressor_attention_mask"],
            batch["document_index"],
        )
    own, wanted = [], []
    for row in range(len(question_rows())):
        prompt, text = (
            batch[f"{kind}_input_ids"][row][batch[f"{kind}_attention_mask"][row].bool()]
            for kind in ("decoder", "teacher")
        )
        at_memory = (prompt == student.decoder_memory_ids[0]).nonzero()
        if not len(at_memory):
            continue  # Read as text by both.
        read, soft_tokens = soft_tokens[: len(at_memory)], soft_tokens[len(at_memory) :]
        behind = len(prompt) - 1 - int(at_memory[-1])
        own.append(states_of(student, prompt, read)[-behind:])
        wanted.append(states_of(teacher, text, read[:0])[-behind:])
    assert 0 < len(own) < len(question_rows())

    with torch.no_grad():
        losses = [
            trainer.compute_loss(student, dict(batch)) for trainer in (labels_alone, with_states)
        ]

    mine, theirs = torch.cat(own), torch.cat(wanted)
    distance = (mine - theirs).abs().sum() / theirs.abs().sum()
    assert (losses[1] - losses[0]).item() == pytest.approx(3 * distance.item(), rel=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on a CPU
def test_compiled_layers_still_tell_their_states() -> None:
    model = build_model(seed=8)
    ids = torch.tensor([5, 6, 7])
    nothing = torch.zeros(0, model.decoder.config.hidden_size)
    before = states_of(model, ids, nothing)

    model.compile_layers()

    assert torch.allclose(states_of(model, ids, nothing), before, atol=1e-5)


def test_states_without_a_teacher_or_of_another_shape_are_refused(
    teacher_folder: Path, tmp_path: Path
) -> None:
    wider = build_model(build_family("Llama", hidden_size=64))

    with pytest.raises(ValueError, match=r"has 2 layers of width 32, .* teach 2 of width 64"):
        trainer_for(wider, teacher_folder, tmp_path, match_weight=1.0)
    with pytest.raises(
        ValueError, match=r"match_weight is 1.0, but nobody teaches. Name a teacher"
    ):
        SoftRAGTrainer(
            wider,
            options=Optimizer(match_weight=1.0),
            run=Run(bf16=False),
            out_dir=tmp_path,
            collator=collator_for(wider),
            train_rows=Rows(question_rows()),
        )
