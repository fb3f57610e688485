"""The training loop: Hugging Face's, with softrag's loss, saving and learning rates."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from softrag import checkpoint
from softrag.adapters import multiplying_once
from softrag.batch import IGNORED
from softrag.model import SoftRAGModel
from softrag.packing import send
from softrag_trainers.collators import MemoryCollator
from softrag_trainers.curriculum import Curriculum
from softrag_trainers.distillation import TextTeacher, recording
from softrag_trainers.options import Optimizer, Run
from softrag_trainers.processes import total
from softrag_trainers.reranking import rerank_loss
from softrag_trainers.watches import BestWeights, EpochCount, LossWatch, Progress, TimeBudget

Scores = Mapping[str, float]

# To which power of its length a lesson weighs (`optimizer.loss_per`).
_LENGTH_POWERS = {"token": 1.0, "root": 0.5, "lesson": 0.0}


def computes_in_bf16(run: Run) -> bool:
    """Tell whether a run computes in bfloat16: as it says, else on a GPU."""
    return torch.cuda.is_available() if run.bf16 is None else run.bf16


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads on the CPU; None: as many as before.

    Beside a GPU the CPU only works out where tokens go: 3 ms a step of 80 questions. More threads
    gain nothing there and keep cores busy while they wait. Of two runs on one GPU, each with as
    many threads as there were cores, each had a quarter of the speed of one with half as many.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class SoftRAGTrainer(Trainer):
    """Trains a `SoftRAGModel` on the lessons of a collator.

    Every evaluation reports the development loss three times: with the right memories
    (`eval_loss`), with another document's (`eval_loss_shuffled`) and with their average
    (`eval_loss_without`). Memories that carry nothing show as three equal numbers.

    Batches stay on the CPU; the model sends what it makes of them to the GPU, which is never waited
    for between two log lines.

    Args:
        model: What is trained, in float32.
        options: Learning rates, batch and length.
        run: How it is carried out.
        out_dir: Where checkpoints go.
        collator: Makes the batches.
        train_rows: What the collator takes.
        eval_rows: The same, held out.
        score: Called with the model at every evaluation, or at the last (`run.score_on_the_way`);
            its figures are logged.
        teacher: What is learned from beside the labels, by `options.distil_weight`.
    """

    def __init__(
        self,
        model: SoftRAGModel,
        *,
        options: Optimizer,
        run: Run,
        out_dir: str | Path,
        collator: MemoryCollator,
        train_rows: Dataset[Any],
        eval_rows: Dataset[Any] | None = None,
        score: Callable[[SoftRAGModel], Scores] | None = None,
        teacher: TextTeacher | None = None,
    ) -> None:
        if options.loss_per not in _LENGTH_POWERS:
            raise ValueError(
                f"optimizer.loss_per is {options.loss_per!r}; expected 'token', 'root' or 'lesson'."
            )
        if options.saying_weight and not collator.saying:
            raise ValueError(
                f"optimizer.saying_weight is {options.saying_weight}, but the collator does not "
                "tell soft tokens what to say. Make it with saying=True, or set the weight to 0."
            )
        if options.match_weight:
            if teacher is None:
                raise ValueError(
                    f"optimizer.match_weight is {options.match_weight}, but nobody teaches. Name "
                    "a teacher, a checkpoint that reads text (teacher=FOLDER), or set the weight "
                    "to 0."
                )
            teacher.check_states(model)
        self.options = options
        self.teacher = teacher
        _freeze_unlearned(model, options)
        self.budget = TimeBudget(options.minutes, uncounted=3 if run.compile else 1)
        self.watch = LossWatch(Path(out_dir))
        self.best = BestWeights() if run.keep_best else None
        self.score = score
        self.score_on_the_way = run.score_on_the_way
        self.collator = collator
        counted = [each for each in (collator, train_rows) if hasattr(each, "epoch")]
        callbacks: list[TrainerCallback] = [EpochCount(*counted), self.budget, self.watch]
        collator.curriculum = None
        if options.curriculum:
            collator.curriculum = Curriculum(model.config, options.curriculum)
            callbacks.append(Progress(collator.curriculum, self.budget))
        evaluates = eval_rows is not None and run.eval_every > 0
        if run.keep_best and not evaluates:
            raise ValueError(
                "run.keep_best chooses between evaluations: give development rows "
                "(data.validation) and set run.eval_every."
            )
        arguments = TrainingArguments(
            output_dir=str(out_dir),
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
            num_train_epochs=options.epochs,
            max_steps=options.steps or -1,
            max_grad_norm=options.clip,
            weight_decay=options.weight_decay,
            bf16=computes_in_bf16(run),
            seed=run.seed,
            data_seed=run.seed,
            dataloader_num_workers=_default_workers() if run.workers is None else run.workers,
            # The model pins what it makes of a batch.
            dataloader_pin_memory=False,
            logging_steps=run.log_every,
            # Its look at every loss waits for the device; the watch's does not.
            logging_nan_inf_filter=False,
            eval_strategy="steps" if evaluates else "no",
            eval_steps=run.eval_every or None,
            save_strategy="steps" if run.save_every else "no",
            save_steps=run.save_every or 500,
            report_to=run.report_to,
            remove_unused_columns=False,
            label_names=["labels"],
            use_cpu=not torch.cuda.is_available(),
            # A bar on a terminal, log lines in a pipe.
            disable_tqdm=not sys.stderr.isatty(),
            # Every trained weight has a gradient; `compute_loss` sees to it.
            ddp_find_unused_parameters=False,
        )
        # Several GPUs take several processes; one process would split batches that can't be split.
        arguments._n_gpu = min(1, arguments.n_gpu)
        if run.gradient_checkpointing:
            _checkpoint_activations(model)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            callbacks=callbacks,
        )
        self.accelerator.device_placement = False
        if teacher is not None:
            teacher.model.to(self.args.device)  # type: ignore[arg-type]
        # The loss divides by the labels of the whole accumulated batch.
        self.model_accepts_loss_kwargs = True

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None
    ) -> TrainOutput:
        """Train; the model can be used without autocast afterwards."""
        model = self.bare_model
        adapted = nullcontext() if self.options.dropout else multiplying_once(model)
        # peft widens adapters' inputs to their float32, only for autocast to narrow them again.
        narrow = disable_input_dtype_casting(model, active=self.args.bf16)
        with narrow, adapted, cpu_threads(1 if torch.cuda.is_available() else None):
            return super().train(resume_from_checkpoint=resume_from_checkpoint)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the parts' learning rates; vectors are not decayed."""
        if self.optimizer is None:
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            for name, parameter in self.bare_model.named_parameters():
                if parameter.requires_grad:
                    rate = _learning_rate(name, self.options)
                    decay = self.options.weight_decay if parameter.ndim > 1 else 0.0
                    groups.setdefault((rate, decay), []).append(parameter)
            self.optimizer = torch.optim.AdamW(
                [{"params": p, "lr": lr, "weight_decay": wd} for (lr, wd), p in groups.items()],
                betas=(0.9, 0.98),
                fused=torch.cuda.is_available(),
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Linear warm-up and decay over the steps, or over the minutes if they end first."""
        if self.lr_scheduler is None:
            warmup = self.options.warmup

            def factor(step: int) -> float:
                done = self.budget.share_done(step, num_training_steps)
                rising = (done + 1 / max(1, num_training_steps)) / warmup if warmup else 1.0
                return max(0.0, min(1.0, rising, (1 - done) / max(1e-9, 1 - warmup)))

            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            self.lr_scheduler = LambdaLR(optimizer, factor)
        return self.lr_scheduler

    def get_batch_samples(  # type: ignore[override]
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], float]:
        """Take the batches of a step; count what their loss is averaged over, on all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        return batches, total(sum(self._count(batch["labels"]) for batch in batches))

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return inputs

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """Count none: it would walk over all weights at every step."""
        return 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | float | None = None,
    ) -> Any:  # noqa: ANN401 (Trainer's own contract)
        """Mean loss of the answer tokens, with the shares of all that is learned beside them."""
        if isinstance(model, DistributedDataParallel):
            # It would send the batch to the GPU.
            model.device_ids = None
        unread = {"relevance"}
        if not self.options.saying_weight:
            unread.add("soft_token_labels")
        read = {
            name: tensor
            for name, tensor in inputs.items()
            if name not in unread and not name.startswith("teacher_")
        }
        labels = inputs["labels"]
        items = self._count(labels) if num_items_in_batch is None else num_items_in_batch
        teacher = self.teacher if "teacher_labels" in inputs else None
        decoder = self.bare_model.decoder
        assert decoder is not None
        layers: Sequence[int] = ()
        if teacher is not None and self.options.match_weight:
            layers = teacher.matched_layers
        with recording(decoder.base_model, layers) as states:
            outputs = model(**read, label_weights=self._weights(labels), num_items_in_batch=items)
        loss = outputs.loss
        if teacher is not None:
            excess, distance = teacher.compare(
                outputs.logits if self.options.distil_weight else None,
                states,
                inputs,
                self._weights(inputs["teacher_labels"]),
            )
            if excess is not None:
                loss = loss + self.options.distil_weight * excess / items
            if distance is not None:
                taught = self._count(inputs["teacher_labels"])
                loss = loss + self.options.match_weight * taught / items * distance
        if outputs.scores is not None and "relevance" in inputs:
            relevance = send(inputs["relevance"], outputs.scores.device)
            reranking = rerank_loss(outputs.scores, relevance)
            loss = loss + self.options.rerank_weight * reranking / items
        if outputs.said_loss is not None:
            loss = loss + self.options.saying_weight * outputs.said_loss / items
        if model.training:
            if num_items_in_batch is not None:
                # Trainer divides over processes by averaging their gradients.
                loss = loss * self.accelerator.num_processes
            if "document_index" not in inputs and self.accelerator.num_processes > 1:
                # Without documents nothing was compressed; the other processes wait for gradients.
                trained = (each for each in self.bare_model.parameters() if each.requires_grad)
                loss = loss + 0.0 * torch.stack([each.sum() for each in trained]).sum()
            self.watch.note(loss, read)
        return (loss, outputs) if return_outputs else loss

    def _count(self, labels: torch.Tensor) -> float:
        """Return what the learned labels weigh together."""
        lengths = (labels != IGNORED).sum(1).double()
        return float((lengths[lengths > 0] ** _LENGTH_POWERS[self.options.loss_per]).sum())

    def _weights(self, labels: torch.Tensor) -> torch.Tensor | None:
        """Return what each label weighs, by the length of its lesson; None: 1."""
        power = _LENGTH_POWERS[self.options.loss_per]
        if power == 1:
            return None
        lengths = (labels != IGNORED).sum(1, keepdim=True).clamp_min(1)
        return (lengths ** (power - 1)).expand_as(labels)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the speed beside every training loss."""
        if "loss" in logs and (speed := self.watch.tokens_per_second()) is not None:
            logs = {**logs, "tokens_per_second": speed}
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Dataset[Any] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the development loss with true, shuffled and no memories, then the scores."""
        model = self.bare_model
        was_training = model.training
        model.eval()
        started = time.perf_counter()
        totals = {"": 0.0, "_shuffled": 0.0, "_without": 0.0}
        labels = 0
        scores: Scores = {}
        # Trainer's own context for losses does nothing: accelerate wraps `forward`, and only that.
        # Uncompiled: generation would compile anew for every length of its cache.
        with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            for batch in self._eval_batches(eval_dataset):
                labels += int((batch["labels"] != IGNORED).sum())
                for kind, loss in _three_losses(model, batch):
                    totals[kind] += loss
            scores_now = self.score_on_the_way or not self.is_in_train
            if self.score is not None and scores_now and self.is_world_process_zero():
                scores = self.score(model)
        metrics = {
            f"{metric_key_prefix}_loss{kind}": total / max(1, labels)
            for kind, total in totals.items()
        }
        metrics |= {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        seconds = time.perf_counter() - started
        metrics[f"{metric_key_prefix}_seconds"] = seconds
        self.watch.leave_out(seconds)
        model.train(was_training)
        if self.best is not None:
            self.best.see(model, metrics[f"{metric_key_prefix}_loss"], self.state.global_step)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _eval_batches(self, rows: Dataset[Any] | None) -> Iterator[dict[str, torch.Tensor]]:
        # Every process sees all rows: the set is small and the result needs no gathering.
        data: Any = self.eval_dataset if rows is None else rows
        size = self.args.per_device_eval_batch_size
        # The same random choices at every evaluation, so that their losses compare; also the same
        # rate. The processes that make batches for training have collators of their own.
        training_epoch, self.collator.epoch = self.collator.epoch, 0
        curriculum, self.collator.curriculum = self.collator.curriculum, None
        for start in range(0, len(data), size):
            stop = min(start + size, len(data))
            yield self.collator([data[index] for index in range(start, stop)])
        self.collator.epoch, self.collator.curriculum = training_epoch, curriculum

    @property
    def bare_model(self) -> SoftRAGModel:
        """The model, out of what distributes it over processes."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ANN401
        self.bare_model.forget_fingerprint()
        self.bare_model.save_pretrained(str(output_dir or self.args.output_dir))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        source = checkpoint.open_source(Path(resume_from_checkpoint))
        checkpoint.load_weights(self.bare_model, source)


def _learning_rate(name: str, options: Optimizer) -> float:
    parts = {"compressor": options.compressor_lr, "decoder": options.decoder_lr}
    return parts.get(name.split(".")[0], options.connector_lr)


def _freeze_unlearned(model: SoftRAGModel, options: Optimizer) -> None:
    """Take no gradients of parts whose learning rate is 0, where another part learns."""
    learning = [bool(_learning_rate(name, options)) for name, _ in model.named_parameters()]
    if any(learning):
        for learns, parameter in zip(learning, model.parameters(), strict=True):
            parameter.requires_grad_(learns and parameter.requires_grad)


def _default_workers() -> int:
    """Return how many processes make batches: enough to keep a GPU from waiting."""
    if not torch.cuda.is_available():
        return 0
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(2, min(8, cores - 2))


def _checkpoint_activations(model: SoftRAGModel) -> None:
    # Under its new name where transformers has it: the old one warns there.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def _three_losses(
    model: SoftRAGModel, batch: dict[str, torch.Tensor]
) -> Iterator[tuple[str, float]]:
    """Yield the summed loss with true, shuffled and averaged memories."""
    prompts = {
        name: batch[name] for name in ("decoder_input_ids", "decoder_attention_mask", "labels")
    }
    soft_tokens = model.line_up_soft_tokens(
        batch.get("compressor_input_ids"),
        batch.get("compressor_attention_mask"),
        batch.get("document_index"),
    )
    average = soft_tokens.mean(0, keepdim=True) if len(soft_tokens) else soft_tokens
    kinds = {
        "": soft_tokens,
        # Half the batch away: another question's documents.
        "_shuffled": soft_tokens.roll(len(soft_tokens) // 2, 0),
        "_without": average.expand_as(soft_tokens),
    }
    for kind, values in kinds.items():
        output = model(**prompts, soft_tokens=values, num_items_in_batch=1)
        yield kind, float(output.loss)
