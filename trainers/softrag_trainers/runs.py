"""The two stages, from options to a saved model."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.utils.data import Dataset
from transformers.trainer_utils import get_last_checkpoint

from softrag.batch import collate_documents, collate_prompts
from softrag.config import SoftRAGConfig
from softrag.evaluation import score_answers
from softrag.model import SoftRAGModel
from softrag.prompt import DocumentPrompt, RagPrompt
from softrag_trainers.collators import FineTuningCollator, PretrainingCollator, TextPiece
from softrag_trainers.examples import QuestionRow, TextRow, load_questions, load_texts
from softrag_trainers.options import Architecture, Finetune, Pretrain, PretrainingData, Run
from softrag_trainers.trainer import SoftRAGTrainer

logger = logging.getLogger(__name__)


def pretrain(options: Pretrain) -> SoftRAGModel:
    """Teach a compressor to hold texts and a decoder to read them.

    Returns:
        The trained model, saved in `options.out_dir`.
    """
    model = _start(options.model, options.arch, options.run)
    data = options.data
    rows = load_texts(data.train, data.samples)
    held_out = load_texts(data.validation, options.run.eval_rows) if data.validation else []
    if not held_out:
        held_out, rows = rows[-options.run.eval_rows :], rows[: -options.run.eval_rows]
    assert model.compressor_tokenizer is not None and model.decoder_tokenizer is not None
    collator = PretrainingCollator(
        model.config,
        model.compressor_tokenizer,
        model.decoder_tokenizer,
        continuation=data.continuation,
        quotation=data.quotation,
        noise=data.noise,
        seed=options.run.seed,
    )
    trainer = SoftRAGTrainer(
        model,
        options=options.optimizer,
        run=options.run,
        out_dir=options.out_dir,
        collator=collator,
        train_rows=TextPieces(rows, collator.document_prompt, data, options.run.seed),
        eval_rows=TextPieces(held_out, collator.document_prompt, data, options.run.seed)
        .first(options.run.eval_rows),
    )
    return _carry_out(trainer, options)


def finetune(options: Finetune) -> SoftRAGModel:
    """Teach a model to answer questions from memories.

    Returns:
        The trained model, saved in `options.out_dir`.
    """
    model = _start(options.model, options.arch, options.run)
    if options.query_dependent is not None:
        model.config.query_dependent = options.query_dependent
    data = options.data
    rows = load_questions(data.train, data.samples)
    held_out = load_questions(data.validation) if data.validation else []
    # Evenly from all files: the first rows would be one data set's.
    random.Random(options.run.seed).shuffle(held_out)
    held_out = held_out[: options.run.eval_rows]
    assert model.compressor_tokenizer is not None and model.decoder_tokenizer is not None
    collator = FineTuningCollator(
        model.config,
        model.compressor_tokenizer,
        model.decoder_tokenizer,
        min_documents=data.min_documents,
        max_documents=data.max_documents,
        text_share=data.text_share,
        seed=options.run.seed,
    )
    trainer = SoftRAGTrainer(
        model,
        options=options.optimizer,
        run=options.run,
        out_dir=options.out_dir,
        collator=collator,
        train_rows=Rows(rows),
        eval_rows=Rows(held_out) if held_out else None,
        score=lambda trained: score_questions(
            trained,
            held_out,
            batch_size=options.optimizer.batch_size,
            max_new_tokens=data.max_new_tokens,
            as_text=data.text_share == 1,
        )
        if held_out
        else {},
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

    Returns:
        Mean `em`, `f1`, `match` and, where its library is installed, `rouge_l`, in percent.
    """
    assert model.compressor_tokenizer is not None and model.decoder_tokenizer is not None
    assert model.decoder is not None
    documents = DocumentPrompt.from_config(model.config, model.compressor_tokenizer)
    rag = RagPrompt.from_config(model.config, model.decoder_tokenizer)
    predictions: list[str] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        rendered = [
            [
                documents.render(text, row.question if model.config.query_dependent else None)
                for text in row.documents
            ]
            for row in batch
        ]
        prompts = collate_prompts(
            [
                rag.render(
                    row.question, row.documents if as_text else [doc.n_memory for doc in docs]
                )
                for row, docs in zip(batch, rendered, strict=True)
            ],
            0,
            side="left",
        )
        ids, mask = prompts.input_ids.to(model.device), prompts.attention_mask.to(model.device)
        flat = [] if as_text else [doc for docs in rendered for doc in docs]
        soft_tokens = model.auto_encoding_embedding.new_zeros(0, model.decoder.config.hidden_size)
        if flat:
            tensors = collate_documents(flat, 0)
            soft_tokens = model.compress(*(tensor.to(model.device) for tensor in tensors))
        generated = model.decoder.generate(
            inputs_embeds=model.embed_prompt(ids, mask, soft_tokens),
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(rag.end_ids),
            pad_token_id=rag.end_id,
        )
        predictions += model.decoder_tokenizer.batch_decode(generated, skip_special_tokens=True)
    return score_answers(predictions, [row.answers for row in rows])


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
        chunks = tuple(
            tokens[start:stop].tolist() for start, stop in zip(borders, borders[1:], strict=False)
        )
        return TextPiece(chunks, tokens[borders[-1] : after].tolist())


def _start(checkpoint: str | None, arch: Architecture, run: Run) -> SoftRAGModel:
    """Load the model to train, or build it, with float32 trained weights."""
    bf16 = torch.cuda.is_available() if run.bf16 is None else run.bf16
    frozen = torch.bfloat16 if bf16 else torch.float32
    if checkpoint is not None:
        model = SoftRAGModel.from_pretrained(checkpoint, dtype=torch.float32).train()
        model.config.storage = "full"
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in model.trained_state())
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


def _carry_out(trainer: SoftRAGTrainer, options: Pretrain | Finetune) -> SoftRAGModel:
    out_dir, run = Path(options.out_dir), options.run
    model = trainer._bare_model
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
