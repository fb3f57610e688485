"""What goes along with a training run: its time, its losses, its best weights."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from softrag.errors import SoftRAGError
from softrag.model import SoftRAGModel
from softrag_trainers.curriculum import Curriculum
from softrag_trainers.processes import agree


class DivergedError(SoftRAGError):
    """The loss is no longer a number."""


class HasEpoch(Protocol):
    """Whatever makes other random choices in every pass over the data."""

    epoch: int


class EpochCount(TrainerCallback):
    """Tells a collator, and data that wants to know, which pass over the data it is."""

    def __init__(self, *counted: HasEpoch) -> None:
        self.counted = counted

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count."""
        for each in self.counted:
            each.epoch = int(state.epoch or 0)


class TimeBudget(TrainerCallback):
    """Ends a run after so many minutes of training.

    Args:
        minutes: From the end of the steps that are not counted; None: never.
        uncounted: How many those are: the first ones compile, which is no training.
    """

    def __init__(self, minutes: float | None, uncounted: int) -> None:
        self.seconds = None if minutes is None else minutes * 60
        self.uncounted = uncounted
        self._steps = 0
        self.started: float | None = None
        self._spent = 0.0

    def share_done(self, step: int, steps: int) -> float:
        """Return how much of the run is done, 0 to 1: of its steps, or of its time if that is more.

        Its time is that of the end of the last step.
        """
        return max(step / max(1, steps), self._spent)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop the run when the time is over."""
        self._steps += 1
        if self.seconds is None or self._steps < self.uncounted:
            return
        if self.started is None:
            self.started = time.monotonic()
        # One clock for all processes: they must stop, and lower their rates, at the same step.
        self._spent = agree(min(1.0, (time.monotonic() - self.started) / self.seconds))
        if self._spent >= 1.0:
            control.should_training_stop = True


class Progress(TrainerCallback):
    """Tells a curriculum how much of the run is done."""

    def __init__(self, curriculum: Curriculum, budget: TimeBudget) -> None:
        self.curriculum = curriculum
        self.budget = budget

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Begin, or go on where a checkpoint was saved, before the first batch is made."""
        self.on_step_end(args, state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tell."""
        self.curriculum.done = self.budget.share_done(state.global_step, state.max_steps)


class BestWeights:
    """Keeps the weights of the evaluation with the lowest development loss, on the host.

    Attributes:
        loss: The lowest loss; infinite before the first evaluation.
        step: Of that evaluation.
    """

    loss = math.inf
    step = 0

    def __init__(self) -> None:
        self._weights: dict[str, torch.Tensor] = {}

    def see(self, model: SoftRAGModel, loss: float, step: int) -> None:
        """Take an evaluation's result, and the weights if it is the best so far."""
        if loss < self.loss:
            self.loss, self.step = loss, step
            trained = model.trained_state()
            self._weights = {name: value.to("cpu", copy=True) for name, value in trained.items()}

    @torch.no_grad()
    def restore(self, model: SoftRAGModel) -> None:
        """Give a model the kept weights."""
        trained = model.trained_state()
        for name, value in self._weights.items():
            trained[name].copy_(value)


class LossWatch(TrainerCallback):
    """Counts real tokens and stops the run when a loss is not finite, keeping the batch.

    The loss of a step is looked at one step later, so that the device need not be waited for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = 0
        self._since: float | None = None
        self._pending: list[tuple[_Sent, dict[str, torch.Tensor]]] = []

    def note(self, loss: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        """Take a step's loss and its batch, which is on the host."""
        masks = [inputs[name] for name in inputs if name.endswith("attention_mask")]
        self.tokens += sum(int(mask.sum()) for mask in masks)
        self._pending.append((_Sent(loss), inputs))
        while len(self._pending) > 1:
            self._check(*self._pending.pop(0))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Look at the loss before the weights are saved; start the clock."""
        if control.should_save:
            # Nothing is to be resumed from weights that are not numbers.
            self._check_pending()
        # The first steps compile; the clock starts behind them.
        if state.global_step == 5:
            self.tokens, self._since = 0, time.perf_counter()

    def tokens_per_second(self) -> int | None:
        """Real tokens read per second of training; None in the first steps."""
        if self._since is None or not self.tokens:
            return None
        return round(self.tokens / max(1e-9, time.perf_counter() - self._since))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Look at the last loss."""
        self._check_pending()

    def leave_out(self, seconds: float) -> None:
        """Don't count so much time, such as an evaluation's, in the speed."""
        if self._since is not None:
            self._since += seconds

    def _check_pending(self) -> None:
        while self._pending:
            self._check(*self._pending.pop(0))

    def _check(self, sent: _Sent, inputs: dict[str, torch.Tensor]) -> None:
        loss = sent.value()
        if math.isfinite(loss):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "diverged_batch.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in inputs.items()}, path)
        raise DivergedError(
            f"The loss is {loss}. The batch that caused it is in {path}. Lower the learning "
            "rates or optimizer.clip, and check run.bf16."
        )


class _Sent:
    """A number on its way from the device to the host."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value = value.detach().to("cpu", non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if value.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def value(self) -> float:
        """Wait for the number, and for nothing that was given to the device after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._value)
