"""The two stages, from options to a saved model."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.utils.data import Dataset
from transformers.trainer_utils import get_last_checkpoint

from softrag.batch import collate_documents, collate_prompts
from softrag.checkpoint import STORAGES
from softrag.config import SoftRAGConfig
from softrag.evaluation import score_answers
from softrag.model import SoftRAGModel
from softrag.prompt import DocumentPrompt, DocumentRow, PromptRow, RagPrompt
from softrag_trainers.collators import (
    FineTuningCollator,
    PretrainingCollator,
    TextPiece,
    cut_text,
)
from softrag_trainers.distillation import TextTeacher
from softrag_trainers.examples import QuestionRow, TextRow, load_questions, load_texts
from softrag_trainers.options import Architecture, Finetune, Pretrain, PretrainingData, Run
from softrag_trainers.reranking import score_reranking
from softrag_trainers.trainer import SoftRAGTrainer, computes_in_bf16

logger = logging.getLogger(__name__)


def pretrain(options: Pretrain) -> SoftRAGModel:
    """Teach a compressor to hold texts and a decoder to read them.

    Returns:
        The trained model, saved in `options.out_dir`.
    """
    data, run = options.data, options.run
    rows = load_texts(_named(data.train), data.samples)
    if data.validation:
        held_out = load_texts(data.validation, run.eval_rows)
    else:
        kept = len(rows) - min(run.eval_rows, len(rows) // 10)
        rows, held_out = rows[:kept], rows[kept:]
    model = _start(options.model, options.arch, run)
    _set_rates(model.config, None, data.rates)
    assert model.compressor_tokenizer is not None
    assert model.decoder_tokenizer is not None
    collator = PretrainingCollator(
        model.config,
        model.compressor_tokenizer,
        model.decoder_tokenizer,
        continuation=data.continuation,
        quotation=data.quotation,
        cloze=data.cloze,
        noise=data.noise,
        seed=run.seed,
    )

    def pieces(texts: list[TextRow]) -> TextPieces:
        return TextPieces(texts, collator.document_prompt, data, run.seed)

    trainer = SoftRAGTrainer(
        model,
        options=options.optimizer,
        run=run,
        out_dir=options.out_dir,
        collator=collator,
        train_rows=pieces(rows),
        eval_rows=pieces(held_out).first(run.eval_rows) if held_out else None,
    )
    return _carry_out(trainer, options)


def finetune(options: Finetune) -> SoftRAGModel:
    """Teach a model to answer questions from memories.

    Returns:
        The trained model, saved in `options.out_dir`.
    """
    data, run = options.data, options.run
    rows = load_questions(_named(data.train), data.samples)
    held_out = load_questions(data.validation)
    # Evenly from all files: the first rows would be one data set's.
    random.Random(run.seed).shuffle(held_out)
    held_out = held_out[: run.eval_rows]
    model = _start(options.model, options.arch, run)
    _set_rates(model.config, options.rate, data.rates)
    if options.query_dependent is not None:
        model.config.query_dependent = options.query_dependent
    if options.rerank:
        model.add_rerank_head()
    teacher = None
    if options.teacher is not None:
        dtype = torch.bfloat16 if computes_in_bf16(run) else torch.float32
        teacher = TextTeacher(options.teacher, model, dtype=dtype)
        if run.compile:
            teacher.compile()
    assert model.compressor_tokenizer is not None
    assert model.decoder_tokenizer is not None
    collator = FineTuningCollator(
        model.config,
        model.compressor_tokenizer,
        model.decoder_tokenizer,
        min_documents=data.min_documents,
        max_documents=data.max_documents,
        text_share=data.text_share,
        teacher=teacher is not None,
        seed=run.seed,
    )

    def score(trained: SoftRAGModel) -> dict[str, float]:
        return score_questions(
            trained,
            held_out,
            batch_size=options.optimizer.batch_size,
            max_new_tokens=data.max_new_tokens,
            as_text=data.text_share == 1,
        )

    trainer = SoftRAGTrainer(
        model,
        options=options.optimizer,
        run=run,
        out_dir=options.out_dir,
        collator=collator,
        train_rows=Rows(rows),
        eval_rows=Rows(held_out) if held_out else None,
        score=score if held_out else None,
        teacher=teacher,
    )
    return _carry_out(trainer, options)


@torch.no_grad()
def score_questions(
    model: SoftRAGModel,
    rows: Sequence[QuestionRow],
    *,
    batch_size: int,
    max_new_tokens: int,
    as_text: bool = False,
) -> dict[str, float]:
    """Answer questions greedily from all their documents, and score the answers.

    Args:
        model: What answers.
        rows: The questions.
        batch_size: Questions answered at once.
        max_new_tokens: The longest answer.
        as_text: Read the documents, cut as the compressor cuts them, instead of memories.

    Returns:
        Mean `em`, `f1`, `match` and, where its library is installed, `rouge_l`, in percent; from a
        model with a rerank head `rerank_accuracy` and `rerank_mrr` as well.
    """
    assert model.compressor_tokenizer is not None
    assert model.decoder_tokenizer is not None
    assert model.decoder is not None
    documents = DocumentPrompt.from_config(model.config, model.compressor_tokenizer)
    rag = RagPrompt.from_config(model.config, model.decoder_tokenizer)
    predictions: list[str] = []
    scores: list[float] = []
    for start in range(0, len(rows), batch_size):
        asked: list[PromptRow] = []
        compressed: list[DocumentRow] = []
        for row in rows[start : start + batch_size]:
            question = row.question if model.config.query_dependent else None
            rendered = [documents.render(text, question) for text in row.documents]
            if as_text:
                pairs = zip(row.documents, rendered, strict=True)
                texts = [cut_text(documents, text, document) for text, document in pairs]
                asked.append(rag.render(row.question, texts))
            else:
                compressed += rendered
                lengths = [document.n_memory for document in rendered]
                asked.append(rag.render(row.question, lengths))
        prompts = collate_prompts(asked, 0, side="left")
        ids, mask = prompts.input_ids.to(model.device), prompts.attention_mask.to(model.device)
        if compressed:
            tensors = (tensor.to(model.device) for tensor in collate_documents(compressed, 0))
            soft_tokens, scored = model.compress_and_score(*tensors)
            scores += [] if scored is None else scored.tolist()
        else:
            soft_tokens = model.line_up_soft_tokens(None, None, None)
        generated = model.decoder.generate(
            inputs_embeds=model.embed_prompt(ids, mask, soft_tokens),
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(rag.end_ids),
            pad_token_id=rag.end_id,
        )
        predictions += model.decoder_tokenizer.batch_decode(generated, skip_special_tokens=True)
    results = score_answers(predictions, [row.answers for row in rows])
    if scores:
        remaining = iter(scores)
        by_question = [[next(remaining) for _ in row.documents] for row in rows]
        results |= score_reranking(by_question, [row.gold for row in rows])
    return results


class Rows(Dataset[Any]):
    """A list as a data set."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401
        """Return one row."""
        return self.rows[index]


class TextPieces(Dataset[TextPiece]):
    """Texts cut into lessons: some consecutive chunks, and what follows them.

    Chunk lengths and counts are drawn once, so that an epoch is the same on every process.

    Args:
        texts: What to cut.
        prompt: Gives the compressor's tokens.
        data: Chunk lengths and counts.
        seed: Of the lengths.
    """

    def __init__(
        self,
        texts: Sequence[TextRow],
        prompt: DocumentPrompt,
        data: PretrainingData,
        seed: int,
    ) -> None:
        draw = random.Random(seed)
        self.tokens: list[torch.Tensor] = []
        self.pieces: list[tuple[int, tuple[int, ...], int]] = []
        # Many texts at once: the tokenizer is parallel only within one call.
        for begin in range(0, len(texts), 1000):
            block = [row.text for row in texts[begin : begin + 1000]]
            encoded = prompt.tokenizer(
                block, add_special_tokens=False, split_special_tokens=True, verbose=False
            )
            for ids in encoded["input_ids"]:
                self._cut(ids, data, draw)
        if not self.pieces:
            raise ValueError(
                f"None of the {len(texts)} texts has {data.min_chunk_tokens} tokens or more; lower "
                "data.min_chunk_tokens or give longer texts."
            )

    def _cut(self, ids: list[int], data: PretrainingData, draw: random.Random) -> None:
        position = 0
        while position < len(ids):
            borders = [position]
            for _ in range(draw.randint(1, data.chunks)):
                length = draw.randint(data.min_chunk_tokens, data.max_chunk_tokens)
                if borders[-1] + length > len(ids):
                    break
                borders.append(borders[-1] + length)
            if len(borders) == 1:
                # The rest of a text is a chunk too, unless it is much too short.
                if len(ids) - position < max(1, data.min_chunk_tokens // 2):
                    break
                borders.append(min(len(ids), position + data.max_chunk_tokens))
            after = min(len(ids), borders[-1] + data.max_chunk_tokens)
            self.pieces.append((len(self.tokens), tuple(borders), after))
            position = borders[-1]
        self.tokens.append(torch.tensor(ids, dtype=torch.int32))

    def first(self, count: int) -> TextPieces:
        """Keep only so many pieces."""
        self.pieces = self.pieces[:count]
        return self

    def __len__(self) -> int:
        """Return the number of lessons."""
        return len(self.pieces)

    def __getitem__(self, index: int) -> TextPiece:
        """Return one lesson's tokens."""
        text, borders, after = self.pieces[index]
        tokens = self.tokens[text]
        chunks = tuple(tokens[start:stop].tolist() for start, stop in pairwise(borders))
        return TextPiece(chunks, tokens[borders[-1] : after].tolist())


def _start(checkpoint: str | None, arch: Architecture, run: Run) -> SoftRAGModel:
    """Load the model to train, or build it, with float32 trained weights."""
    if run.storage not in STORAGES:
        raise ValueError(f"run.storage is {run.storage!r}; expected one of {STORAGES}.")
    frozen = torch.bfloat16 if computes_in_bf16(run) else torch.float32
    if checkpoint is not None:
        model = SoftRAGModel.from_pretrained(checkpoint, dtype=torch.float32).train()
        model.config.storage = "full"
        trained = set(model.trained_state())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(frozen)
        return model

    def lora(rank: int) -> dict[str, Any] | None:
        alpha = round(arch.lora_alpha * rank)
        return {"r": rank, "alpha": alpha, "dropout": arch.lora_dropout} if rank else None

    config = SoftRAGConfig(
        decoder=arch.decoder,
        compressor=arch.compressor,
        compressor_layers=arch.compressor_layers,
        rate=arch.rate,
        memory_tokens=arch.memory_tokens,
        max_document_tokens=arch.max_document_tokens,
        readout=arch.readout,
        connector_hidden=arch.connector_hidden,
        decoder_lora=lora(arch.decoder_lora_r),
        compressor_lora=lora(arch.compressor_lora_r),
    )
    return SoftRAGModel.from_base(
        config, dtype=torch.float32, frozen_dtype=frozen, seed=run.seed
    ).train()


def _set_rates(config: SoftRAGConfig, rate: int | None, rates: list[int]) -> None:
    # In a new configuration, whose making checks them.
    checked = SoftRAGConfig(
        rate=rate or config.rate,
        rates=sorted(set(rates)) or config.rates,
        memory_tokens=config.memory_tokens,
    )
    config.rate, config.rates = checked.rate, checked.rates


def _named(files: list[str]) -> list[str]:
    if not files:
        raise ValueError("There is nothing to train on: give files, data.train=[FILE,...].")
    return files


def _carry_out(trainer: SoftRAGTrainer, options: Pretrain | Finetune) -> SoftRAGModel:
    out_dir, run = Path(options.out_dir), options.run
    model = trainer.bare_model
    if run.compile:
        model.compile_layers()
    resume = get_last_checkpoint(str(out_dir)) if run.resume and out_dir.is_dir() else None
    if run.resume and resume is None:
        logger.info("no checkpoint in %s to resume from; starting anew", out_dir)
    trainer.train(resume_from_checkpoint=resume)
    model.forget_fingerprint()
    if trainer.is_world_process_zero():
        # Before any evaluation, which may fail.
        model.save_pretrained(out_dir, storage=run.storage)
        OmegaConf.save(OmegaConf.create(dataclasses.asdict(options)), out_dir / "options.yaml")
        trainer.state.save_to_json(str(out_dir / "trainer_state.json"))
    if trainer.eval_dataset is not None:
        trainer.evaluate()
        if trainer.is_world_process_zero():
            trainer.state.save_to_json(str(out_dir / "trainer_state.json"))
    return model
