"""Pre-training lessons between questions: how many, which, and what they teach."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from softrag.batch import IGNORED
from softrag.model import SoftRAGModel
from softrag.prompt import token_id
from softrag_trainers.__main__ import main
from softrag_trainers.distillation import TextTeacher
from softrag_trainers.finetuning import FineTuningCollator, Replay, Rows
from softrag_trainers.options import Optimizer, Run, TextLessons
from softrag_trainers.pretraining import PretrainingCollator, TextPiece, TextPieces
from softrag_trainers.trainer import SoftRAGTrainer
from tests.checkpoints import build_model
from tests.trainers.tiny import (
    question_records,
    question_rows,
    text_records,
    text_rows,
    tiny_arch,
    write_lines,
)


def collator_for(model: SoftRAGModel, **options: Any) -> FineTuningCollator:
    parts = (model.config, model.compressor_tokenizer, model.decoder_tokenizer)
    texts = PretrainingCollator(*parts, continuation=0.2, quotation=0.2, cloze=0.4)
    return FineTuningCollator(*parts, replay=texts, **options)


def pieces_for(model: SoftRAGModel) -> TextPieces:
    collator = collator_for(model)
    data = TextLessons(min_chunk_tokens=8, max_chunk_tokens=60, chunks=2)
    return TextPieces(text_rows(), collator.document_prompt, data, seed=0)


def kinds(rows: Replay) -> Counter[str]:
    return Counter(type(rows[index]).__name__ for index in range(len(rows)))


@pytest.mark.parametrize(("share", "pieces"), [(0.0, 0), (0.2, 2), (0.5, 8), (0.75, 24)])
def test_a_share_of_the_rows_are_texts_and_every_question_is_read_once(
    share: float, pieces: int
) -> None:
    rows = Replay(question_rows(), pieces_for(build_model()), share=share, seed=0)

    assert kinds(rows) == Counter({"QuestionRow": 8, "TextPiece": pieces} if pieces else
                                  {"QuestionRow": 8})  # fmt: skip
    assert [rows[index] for index in range(8)] == question_rows()


def test_every_epoch_reads_on_in_the_texts_until_all_were_read() -> None:
    texts = pieces_for(build_model())
    rows = Replay(question_rows(), texts, share=0.5, seed=0)
    read = []
    for rows.epoch in range(-(-len(texts) // 8)):
        read += [repr(rows[index]) for index in range(8, len(rows))]

    everything = [repr(texts[index]) for index in range(len(texts))]
    assert sorted(read[: len(texts)]) == sorted(everything)
    assert read[: len(texts)] != everything
    # From the front again.
    assert read[len(texts) :] == read[: len(read) - len(texts)]
    again = Replay(question_rows(), texts, share=0.5, seed=0)
    assert [repr(again[index]) for index in range(8, len(again))] == read[:8]
    other = Replay(question_rows(), texts, share=0.5, seed=1)
    assert [repr(other[index]) for index in range(8, len(other))] != read[:8]


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_leaves_no_questions_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"replay\.share is .*less than 1"):
        Replay(question_rows(), pieces_for(build_model()), share=share, seed=0)


def test_a_mixed_batch_teaches_what_two_batches_would() -> None:
    model = build_model()
    collator = collator_for(model, min_documents=1, text_share=0.3)
    questions = question_rows()[:3]
    texts = [pieces_for(model)[index] for index in range(3)]
    mixed = [piece for pair in zip(texts, questions, strict=True) for piece in pair]

    with torch.no_grad():
        together = model(**collator(mixed))
        apart = [model(**collator(questions)), model(**collator.replay(texts))]

    expected = torch.cat([output.logits for output in apart])
    torch.testing.assert_close(together.logits, expected, rtol=1e-4, atol=1e-4)


def test_query_dependent_models_read_texts_alone_and_clozes_with_their_question() -> None:
    model = build_model(query_dependent=True, rerank=True)
    collator = collator_for(model)
    texts = pieces_for(model)
    pieces = [texts[index] for index in range(len(texts))]

    tensors = collator([*question_rows(), *pieces])

    read = model.compressor_tokenizer.batch_decode(
        [
            ids[mask.bool()]
            for ids, mask in zip(
                tensors["compressor_input_ids"], tensors["compressor_attention_mask"], strict=True
            )
        ],
        skip_special_tokens=True,
    )
    asked = [text.startswith("Question:") and text.endswith("\nAnswer:") for text in read]
    assert not all(asked)
    # Of the questions' documents it is known whether they are gold, of the clozes' chunks which one
    # was asked about; of texts that are read alone nothing.
    assert (~tensors["relevance"].isnan()).tolist() == asked
    assert sum(asked) > 16
    assert any("____" in text for text in read)
    assert len(question_rows()) < (tensors["relevance"] == 1).sum() < sum(asked)
    rerank = token_id(model.compressor_tokenizer, "<RR>")
    assert (tensors["compressor_input_ids"] == rerank).sum() == len(asked)
    scored = model(**{name: t for name, t in tensors.items() if name != "relevance"})
    assert scored.scores.shape == tensors["relevance"].shape


def test_a_teacher_reads_the_chunks_of_clozes_as_text_and_no_other_lesson_of_texts() -> None:
    model = build_model()
    tokenizer = model.decoder_tokenizer
    tokenizers = model.compressor_tokenizer, tokenizer
    pieces = pieces_for(model)
    rows = [pieces[index] for index in range(len(pieces))]
    collator = PretrainingCollator(
        model.config, *tokenizers, continuation=0.0, cloze=0.5, teacher=True
    )

    lessons = collator.lessons(rows)

    asked = [lesson for lesson in lessons if lesson.teacher is not None]
    assert 0 < len(asked) < len(lessons)
    for lesson in asked:
        text = tokenizer.decode(lesson.teacher.input_ids)
        assert "____" in text
        assert "<MEM>" not in text
        for document in lesson.documents:
            chunk = tokenizer.decode(document.input_ids, skip_special_tokens=True)
            assert chunk in text
    assert all(
        "____" not in tokenizer.decode(other.prompt.input_ids)
        for other in lessons
        if other.teacher is None
    )


def test_a_teacher_shares_the_loss_of_questions_and_not_of_texts(tmp_path: Path) -> None:
    build_model(seed=7).save_pretrained(tmp_path / "teacher")
    student = build_model(seed=8)
    collator = collator_for(student, teacher=True, text_share=0.3)
    rows = [pieces_for(student)[0], *question_rows()[:3], pieces_for(student)[1]]
    batch = collator(rows)
    teacher = TextTeacher(tmp_path / "teacher", student, dtype=torch.float32)
    own = {name: t for name, t in batch.items() if not name.startswith("teacher_")}
    with torch.no_grad():
        output = student(**own)
        excess = teacher.compare(output.logits, [], batch)[0]
        n_taught = int((batch["teacher_labels"] != IGNORED).sum())
        labels = batch["labels"][batch["labels"] != IGNORED]
        losses = torch.nn.functional.cross_entropy(output.logits, labels, reduction="none")

        trainer = SoftRAGTrainer(
            student,
            options=Optimizer(distil_weight=0.5),
            run=Run(bf16=False),
            out_dir=tmp_path,
            collator=collator,
            train_rows=Rows(rows),
            teacher=teacher,
        )
        loss = trainer.compute_loss(student, dict(batch))

    assert len(batch["teacher_input_ids"]) == 3
    assert 0 < n_taught < len(labels)
    divergence = excess + losses[:n_taught].sum()
    expected = losses[n_taught:].sum() + (losses[:n_taught].sum() + divergence) / 2
    assert loss.item() == pytest.approx(expected.item() / len(labels), rel=1e-5)


def test_a_fine_tuning_with_replay_is_repeated_by_its_seed(tmp_path: Path) -> None:
    questions = write_lines(tmp_path / "questions.jsonl", question_records())
    texts = write_lines(tmp_path / "texts.jsonl", text_records())

    def losses(name: str, *options: str) -> list[float]:
        folder = tmp_path / name
        arguments = ["optimizer.batch_size=4", "optimizer.steps=4", "run.log_every=1"]
        replay = [f"replay.train=[{texts}]", "replay.min_chunk_tokens=8", "replay.share=0.5"]
        files = [f"data.train=[{questions}]", f"out_dir={folder}"]
        assert main(["finetune", *tiny_arch(), *arguments, *replay, *files, *options]) == 0
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    first = losses("first")

    assert losses("workers", "run.workers=2") == first
    assert losses("other", "run.seed=1") != first
    assert losses("without", "replay.train=[]") != first


def test_a_piece_of_text_is_no_question_without_replay() -> None:
    model = build_model()
    plain = FineTuningCollator(model.config, model.compressor_tokenizer, model.decoder_tokenizer)

    with pytest.raises(AttributeError, match="answers"):
        plain([TextPiece(([5, 6],))])
