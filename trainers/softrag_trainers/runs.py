"""The two stages, from options to a saved model."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers.trainer_utils import get_last_checkpoint

from softrag.adapters import is_lora_weight, set_dropout
from softrag.batch import collate_documents, collate_prompts
from softrag.checkpoint import STORAGES
from softrag.config import ASKED_FIRST, SoftRAGConfig
from softrag.evaluation import score_answers
from softrag.model import SoftRAGModel
from softrag.packing import pack
from softrag.prompt import DocumentPrompt, DocumentRow, PromptRow, RagPrompt
from softrag_trainers.distillation import TextTeacher
from softrag_trainers.examples import QuestionRow, TextRow, load_questions, load_texts
from softrag_trainers.finetuning import FineTuningCollator, Replay, Rows, cut_text
from softrag_trainers.options import Finetune, Pretrain, Run, TextLessons, WarmStart
from softrag_trainers.pretraining import PretrainingCollator, TextPieces
from softrag_trainers.processes import take_device
from softrag_trainers.reranking import score_reranking
from softrag_trainers.trainer import SoftRAGTrainer, computes_in_bf16

logger = logging.getLogger(__name__)

_MEASURED_DOCUMENTS = 96

# A text, and the question that a query-dependent compressor reads with it.
_Document = tuple[str, str | None]


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
    model, known = _start(options)
    _set_rates(model.config, None, data.rates)
    _calibrate_connector(model, known, ((row.text, None) for row in rows), run)
    saying = options.optimizer.saying_weight > 0
    collator = _collator_of_texts(model, data, run.seed, saying=saying)

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
    # Evenly from all files: the first rows would be one data set's. The same ones whatever the
    # run's seed, so that losses of several seeds compare.
    random.Random(0).shuffle(held_out)
    held_out = held_out[: run.eval_rows]
    model, known = _start(options)
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
    replayed, texts = options.replay, None
    train_rows: Rows | Replay = Rows(rows)
    documents: Iterable[_Document] = (
        (text, row.question) for row in rows for text in row.documents
    )
    if replayed.train and replayed.share:
        texts = _collator_of_texts(model, replayed, run.seed, teacher=teacher is not None)
        text_rows = load_texts(replayed.train, replayed.samples)
        pieces = TextPieces(text_rows, texts.document_prompt, replayed, run.seed)
        train_rows = Replay(rows, pieces, share=replayed.share, seed=run.seed)
        documents = ((row.text, None) for row in text_rows)
    _calibrate_connector(model, known, documents, run)
    optimizer = options.optimizer
    if data.text_share == 1 and texts is None:
        # No row has a document to compress.
        optimizer = dataclasses.replace(optimizer, compressor_lr=0.0, connector_lr=0.0)
    assert model.compressor_tokenizer is not None
    assert model.decoder_tokenizer is not None
    collator = FineTuningCollator(
        model.config,
        model.compressor_tokenizer,
        model.decoder_tokenizer,
        min_documents=data.min_documents,
        max_documents=data.max_documents,
        text_share=data.text_share,
        mixed_share=data.mixed_share,
        ranked=data.ranked,
        teacher=teacher is not None,
        saying=options.optimizer.saying_weight > 0,
        replay=texts,
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
        options=optimizer,
        run=run,
        out_dir=options.out_dir,
        collator=collator,
        train_rows=train_rows,
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


def _start(options: Pretrain | Finetune) -> tuple[SoftRAGModel, set[str]]:
    """Load the model to train, or build it, with float32 trained weights.

    Returns:
        The model, and the names of its tensors that come from a checkpoint.
    """
    run, arch, dropout = options.run, options.arch, options.optimizer.dropout
    if run.storage not in STORAGES:
        raise ValueError(f"run.storage is {run.storage!r}; expected one of {STORAGES}.")
    take_device()
    frozen = torch.bfloat16 if computes_in_bf16(run) else torch.float32
    if options.model is not None:
        if options.warm_start.checkpoint is not None:
            raise ValueError(
                f"Found model={options.model} and warm_start.checkpoint="
                f"{options.warm_start.checkpoint}; expected one of them. `model` goes on with a "
                "checkpoint as it is; `warm_start` gives weights to what `arch` builds."
            )
        model = SoftRAGModel.from_pretrained(options.model, dtype=torch.float32).train()
        model.config.storage = "full"
        known, learned = set(model.trained_state()), model.learned_names()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in learned)
            if name not in known:
                parameter.data = parameter.data.to(frozen)
        for part, adapters in (
            (model.decoder, model.config.decoder_lora),
            (model.compressor, model.config.compressor_lora),
        ):
            if part is not None and adapters is not None:
                adapters["dropout"] = dropout
                set_dropout(part, dropout)
        return model, known

    def lora(rank: int) -> dict[str, Any] | None:
        alpha = round(arch.lora_alpha * rank)
        return {"r": rank, "alpha": alpha, "dropout": dropout} if rank else None

    config = SoftRAGConfig(
        decoder=arch.decoder,
        compressor=arch.compressor,
        compressor_layers=arch.compressor_layers,
        rate=arch.rate,
        memory_tokens=arch.memory_tokens,
        max_document_tokens=arch.max_document_tokens,
        readout=arch.readout,
        connector=arch.connector,
        connector_hidden=arch.connector_hidden,
        decoder_lora=lora(arch.decoder_lora_r),
        compressor_lora=lora(arch.compressor_lora_r),
        rag_prompt={"user": ASKED_FIRST} if arch.question_first else {},
    )
    model = SoftRAGModel.from_base(config, dtype=torch.float32, frozen_dtype=frozen, seed=run.seed)
    taken: set[str] = set()
    if options.warm_start.checkpoint is not None:
        taken = _take_weights(model, options.warm_start)
    elif options.warm_start.reader:
        raise ValueError(
            "warm_start.reader takes the decoder's adapters of a checkpoint: name it "
            "(warm_start.checkpoint=FOLDER)."
        )
    return model.train(), taken


@torch.no_grad()
def _calibrate_connector(
    model: SoftRAGModel, known: set[str], documents: Iterable[_Document], run: Run
) -> None:
    """Measure the states that a new standardized connector gets, on the first documents.

    `known` are the tensors that come from a checkpoint: one that was measured stays as it is.
    """
    measured = "connector.mean"
    if measured in known or measured not in dict(model.named_parameters()):
        return
    config = model.config
    distinct: dict[str, str | None] = {}
    for text, question in documents:
        if len(distinct) == _MEASURED_DOCUMENTS:
            break
        distinct.setdefault(text, question if config.query_dependent else None)
    if not distinct:
        return
    assert model.compressor_tokenizer is not None
    prompt = DocumentPrompt.from_config(config, model.compressor_tokenizer)
    alone = prompt.without_question()
    batch = collate_documents(
        [
            alone.render(text) if question is None else prompt.render(text, question)
            for text, question in distinct.items()
        ],
        0,
    )
    packed = pack(batch.attention_mask)
    # Where and as it will be trained.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()  # type: ignore[arg-type]
    with torch.autocast(model.device.type, torch.bfloat16, enabled=computes_in_bf16(run)):
        model.calibrate_connector(batch.input_ids.flatten()[packed.slot], packed)
    model.train()


@torch.no_grad()
def _take_weights(model: SoftRAGModel, start: WarmStart) -> set[str]:
    """Copy what fits of a checkpoint; return the names of what was copied."""
    assert start.checkpoint is not None
    known = SoftRAGModel.from_pretrained(start.checkpoint, dtype=torch.float32, device="cpu")
    assert model.decoder is not None
    ours, theirs = model.trained_state(), known.trained_state()
    readers = f"decoder.{model.decoder.base_model_prefix}."
    adapters = [n for n in ours if n.startswith("compressor.") and is_lora_weight(n)]
    taken_from = {name: name for name in ours if name.startswith(tuple(start.parts or [""]))}
    if known.config.connector != model.config.connector:
        # Layers of the same name and shape, which read other values.
        taken_from = {n: s for n, s in taken_from.items() if not n.startswith("connector.")}
    if start.reader:
        taken_from |= {name: name.replace("compressor.", readers, 1) for name in adapters}
    fitting = {
        name: fitted
        for name, source in taken_from.items()
        if source in theirs and (fitted := _fitted(name, ours[name], theirs[source])) is not None
    }
    if start.reader and not (adapters and fitting.keys() >= set(adapters)):
        raise ValueError(
            f"warm_start.reader: the adapters of the decoder of {start.checkpoint} do not fit the "
            "compressor. Set arch.compressor=shared, arch.compressor_layers=null and "
            "arch.compressor_lora_r to the rank of its decoder_lora "
            f"({(known.config.decoder_lora or {}).get('r')}) or a higher one."
        )
    if not fitting:
        raise ValueError(
            f"Nothing of {start.checkpoint} fits what is built, of the parts "
            f"{start.parts or 'all'}: no tensor has the same name and shape. Set arch as the "
            "checkpoint's config.json says, or leave warm_start out."
        )
    for name, tensor in fitting.items():
        ours[name].copy_(tensor)
    logger.info("%d of %d tensors from %s", len(fitting), len(ours), start.checkpoint)
    return set(fitting)


def _fitted(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor | None:
    """Return what a tensor becomes if another is taken in its place; None: that does not fit.

    Adapters of a lower rank fit: the further ranks stay as they start, which adds nothing yet.
    """
    if theirs.shape == ours.shape:
        return theirs
    if not is_lora_weight(name):
        return None
    ranks = 0 if ".lora_A." in name else 1
    width = 1 - ranks
    if theirs.shape[width] != ours.shape[width] or theirs.shape[ranks] > ours.shape[ranks]:
        return None
    wide = ours.clone()
    wide.narrow(ranks, 0, theirs.shape[ranks]).copy_(theirs)
    return wide


def _collator_of_texts(
    model: SoftRAGModel,
    data: TextLessons,
    seed: int,
    *,
    saying: bool = False,
    teacher: bool = False,
) -> PretrainingCollator:
    assert model.compressor_tokenizer is not None
    assert model.decoder_tokenizer is not None
    return PretrainingCollator(
        model.config,
        model.compressor_tokenizer,
        model.decoder_tokenizer,
        continuation=data.continuation,
        quotation=data.quotation,
        cloze=data.cloze,
        noise=data.noise,
        saying=saying,
        teacher=teacher,
        seed=seed,
    )


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
        # Layers are compiled one by one; there is nothing to split where gradients are exchanged.
        torch._dynamo.config.optimize_ddp = False
    resume = get_last_checkpoint(str(out_dir)) if run.resume and out_dir.is_dir() else None
    if run.resume and resume is None:
        logger.info("no checkpoint in %s to resume from; starting anew", out_dir)
    trainer.train(resume_from_checkpoint=resume)

    # Before any evaluation, which may fail.
    _save(trainer, options)
    if trainer.eval_dataset is not None:
        trainer.evaluate()
        if trainer.best is not None:
            if trainer.best.step < trainer.state.global_step:
                trainer.best.restore(model)
                _save(trainer, options)
            trainer.log({"kept_step": trainer.best.step, "kept_loss": trainer.best.loss})
        if trainer.is_world_process_zero():
            trainer.state.save_to_json(str(out_dir / "trainer_state.json"))
    return model


def _save(trainer: SoftRAGTrainer, options: Pretrain | Finetune) -> None:
    model, out_dir = trainer.bare_model, Path(options.out_dir)
    model.forget_fingerprint()
    if trainer.is_world_process_zero():
        model.save_pretrained(out_dir, storage=options.run.storage)
        OmegaConf.save(OmegaConf.create(dataclasses.asdict(options)), out_dir / "options.yaml")
        trainer.state.save_to_json(str(out_dir / "trainer_state.json"))
