"""The training loop: Hugging Face's, with softrag's loss, saving and learning rates."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import save_file
from torch import distributed, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from softrag import checkpoint
from softrag.batch import IGNORED
from softrag.errors import SoftRAGError
from softrag.model import SoftRAGModel
from softrag_trainers.collators import MemoryCollator
from softrag_trainers.distillation import TextTeacher
from softrag_trainers.options import Optimizer, Run
from softrag_trainers.reranking import rerank_loss

logger = logging.getLogger(__name__)

Scores = Mapping[str, float]


def computes_in_bf16(run: Run) -> bool:
    """Tell whether a run computes in bfloat16: as it says, else on a GPU."""
    return torch.cuda.is_available() if run.bf16 is None else run.bf16


class DivergedError(SoftRAGError):
    """The loss is no longer a number."""


class SoftRAGTrainer(Trainer):
    """Trains a `SoftRAGModel` on the lessons of a collator.

    Every evaluation reports the development loss three times: with the right memories
    (`eval_loss`), with another document's (`eval_loss_shuffled`) and with their average
    (`eval_loss_without`). Memories that carry nothing show as three equal numbers.

    Args:
        model: What is trained, in float32.
        options: Learning rates, batch and length.
        run: How it is carried out.
        out_dir: Where checkpoints go.
        collator: Makes the batches.
        train_rows: What the collator takes.
        eval_rows: The same, held out.
        score: Called with the model at every evaluation; its figures are logged.
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
        self.options = options
        self.teacher = teacher
        self.budget = _TimeBudget(options.minutes)
        self.watch = _LossWatch(Path(out_dir))
        self.score = score
        self.collator = collator
        workers = 4 if torch.cuda.is_available() else 0
        evaluates = eval_rows is not None and run.eval_every > 0
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
            dataloader_num_workers=workers if run.workers is None else run.workers,
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=run.log_every,
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
            # A batch may hold no placeholder or no <AE>; its parameters then have no gradient.
            ddp_find_unused_parameters=True,
        )
        if run.gradient_checkpointing:
            _checkpoint_activations(model)
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            callbacks=[_EpochCount(collator), self.budget, self.watch],
        )
        if teacher is not None:
            teacher.model.to(self.args.device)  # type: ignore[arg-type]
        # The loss divides by the labels of the whole accumulated batch.
        self.model_accepts_loss_kwargs = True

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None
    ) -> TrainOutput:
        """Train; the model can be used without autocast afterwards."""
        # peft widens adapters' inputs to their float32, only for autocast to narrow them again.
        with disable_input_dtype_casting(self.bare_model, active=self.args.bf16):
            return super().train(resume_from_checkpoint=resume_from_checkpoint)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the parts' learning rates; vectors are not decayed."""
        if self.optimizer is None:
            rates = {
                "compressor": self.options.compressor_lr,
                "decoder": self.options.decoder_lr,
            }
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            for name, parameter in self.bare_model.named_parameters():
                if parameter.requires_grad:
                    rate = rates.get(name.split(".")[0], self.options.connector_lr)
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
                done = max(step / max(1, num_training_steps), self.budget.share_spent())
                rising = (done + 1 / max(1, num_training_steps)) / warmup if warmup else 1.0
                return max(0.0, min(1.0, rising, (1 - done) / max(1e-9, 1 - warmup)))

            optimizer = optimizer or self.optimizer
            assert optimizer is not None
            self.lr_scheduler = LambdaLR(optimizer, factor)
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:  # noqa: ANN401 (Trainer's own contract)
        """Mean loss of the answer tokens, with the teacher's and the rerank head's share."""
        read = {
            name: tensor
            for name, tensor in inputs.items()
            if name != "relevance" and not name.startswith("teacher_")
        }
        outputs = model(**read, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        items = len(outputs.logits) if num_items_in_batch is None else num_items_in_batch
        if self.teacher is not None:
            share = self.options.distil_weight
            loss = (1 - share) * loss + share * self.teacher.compare(outputs.logits, inputs) / items
        if outputs.scores is not None and "relevance" in inputs:
            reranking = rerank_loss(outputs.scores, inputs["relevance"])
            loss = loss + self.options.rerank_weight * reranking / items
        if model.training:
            if num_items_in_batch is not None:
                # Trainer divides over processes by averaging their gradients.
                loss = loss * self.accelerator.num_processes
            self.watch.note(loss, read)
        return (loss, outputs) if return_outputs else loss

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
            if self.score is not None and self.is_world_process_zero():
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
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _eval_batches(self, rows: Dataset[Any] | None) -> Iterator[dict[str, torch.Tensor]]:
        # Every process sees all rows: the set is small and the result needs no gathering.
        data: Any = self.eval_dataset if rows is None else rows
        size = self.args.per_device_eval_batch_size
        # The same random choices at every evaluation, so that their losses compare.
        training_epoch, self.collator.epoch = self.collator.epoch, 0
        for start in range(0, len(data), size):
            stop = min(start + size, len(data))
            batch = self.collator([data[index] for index in range(start, stop)])
            yield {name: tensor.to(self.args.device) for name, tensor in batch.items()}
        self.collator.epoch = training_epoch

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


class _EpochCount(TrainerCallback):
    """Tells the collator which pass over the data it is."""

    def __init__(self, collator: MemoryCollator) -> None:
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.collator.epoch = int(state.epoch or 0)


class _TimeBudget(TrainerCallback):
    """Ends a run after so many minutes of training."""

    def __init__(self, minutes: float | None) -> None:
        self.seconds = None if minutes is None else minutes * 60
        self.started: float | None = None
        self._spent = 0.0

    def share_spent(self) -> float:
        """Return how much of the time had gone when the last step ended, 0 to 1."""
        return self._spent

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.seconds is None:
            return
        # From the end of the first step: compilation is no training.
        if self.started is None:
            self.started = time.monotonic()
        spent = [min(1.0, (time.monotonic() - self.started) / self.seconds)]
        if args.world_size > 1:
            # One clock for all: they must stop, and lower their rates, at the same step.
            distributed.broadcast_object_list(spent, group=self._on_the_host)
        self._spent = spent[0]
        if self._spent >= 1.0:
            control.should_training_stop = True

    @cached_property
    def _on_the_host(self) -> distributed.ProcessGroup:
        # Through the GPU, every step would wait for the one before it.
        group: Any = distributed.new_group(backend="gloo")
        return group


class _LossWatch(TrainerCallback):
    """Counts real tokens and stops the run when a loss is not finite, keeping the batch.

    The loss of a step is looked at one step later, so that the device need not be waited for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = 0
        self._since: float | None = None
        self._pending: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
        self._counts: list[torch.Tensor] = []

    def note(self, loss: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        masks = [inputs[name] for name in inputs if name.endswith("attention_mask")]
        self._counts.append(torch.stack([mask.sum() for mask in masks]).sum())
        self._pending.append((loss.detach(), inputs))
        while len(self._pending) > 1:
            self._check(*self._pending.pop(0))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if control.should_save:
            # Nothing is to be resumed from weights that are not numbers.
            self._check_pending()
        # The first steps compile; the clock starts behind them.
        if state.global_step == 5:
            self._drain()
            self.tokens, self._since = 0, time.perf_counter()

    def tokens_per_second(self) -> int | None:
        """Real tokens read per second of training; None in the first steps."""
        self._drain()
        if self._since is None or not self.tokens:
            return None
        return round(self.tokens / max(1e-9, time.perf_counter() - self._since))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._check_pending()

    def leave_out(self, seconds: float) -> None:
        """Don't count so much time, such as an evaluation's, in the speed."""
        if self._since is not None:
            self._since += seconds

    def _drain(self) -> None:
        self.tokens += int(sum(int(count) for count in self._counts))
        self._counts.clear()

    def _check_pending(self) -> None:
        while self._pending:
            self._check(*self._pending.pop(0))

    def _check(self, loss: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        if torch.isfinite(loss):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "diverged_batch.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in inputs.items()}, path)
        raise DivergedError(
            f"The loss is {float(loss)}. The batch that caused it is in {path}. Lower the learning "
            "rates or optimizer.clip, and check run.bf16."
        )
