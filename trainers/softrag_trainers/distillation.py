"""Learning from a decoder that reads the documents as text.

A label says which token was right. The teacher says how likely every token was to a reader of the
whole text, and what its layers made of every token behind the documents. It knows no collator and
no training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softrag.batch import IGNORED
from softrag.model import SoftRAGModel
from softrag.packing import send
from softrag.prompt import encode_text

_MATCHED_EVERY = 3
"""Layers from one whose states are compared to the next; the last is among them."""

_PROBE = "Who wrote \u201cHamlet\u201d?\n\n1. William Shakespeare, 1599\u20131601"


class TextTeacher:
    """A frozen decoder with its adapters merged.

    Args:
        checkpoint: A model fine-tuned to read text (`data.text_share=1`).
        student: Who learns from it; both must read the same prompts and tokens.
        dtype: Of the teacher's weights.

    Raises:
        CheckpointError: The checkpoint can't be loaded.
        ValueError: The teacher reads other prompts or tokens than the student.
    """

    def __init__(
        self, checkpoint: str | Path, student: SoftRAGModel, *, dtype: torch.dtype
    ) -> None:
        model = SoftRAGModel.from_pretrained(checkpoint, load_compressor=False, dtype=dtype)
        for name, own, other in (
            ("prompt texts", model.config.rag_prompt, student.config.rag_prompt),
            ("tokens", _tokens(model), _tokens(student)),
        ):
            if own != other:
                raise ValueError(
                    f"The teacher {checkpoint} has other {name} than the model it is to teach. "
                    "Fine-tune a teacher from the same decoder, with data.text_share=1."
                )
        self.model = model.merge_adapters().requires_grad_(False)
        self._excess: Callable[..., torch.Tensor] = excess
        self._distance: Callable[..., torch.Tensor] = distance
        depth, _ = _shape(self.model)
        self.matched_layers = range((depth - 1) % _MATCHED_EVERY, depth, _MATCHED_EVERY)

    def check_states(self, student: SoftRAGModel) -> None:
        """Refuse to compare states with a student whose decoder is of another shape.

        Raises:
            ValueError: It has more or fewer layers, or is wider or narrower.
        """
        own, other = (_shape(model) for model in (self.model, student))
        if own != other:
            raise ValueError(
                f"optimizer.match_weight compares states layer by layer: the teacher has {own[0]} "
                f"layers of width {own[1]}, the decoder it is to teach {other[0]} of width "
                f"{other[1]}. Fine-tune a teacher from the same decoder, or set "
                "optimizer.match_weight=0 and learn from its answers alone."
            )

    def compile(self) -> None:
        """Compile what takes the time (CUDA training)."""
        self.model.compile_layers()
        self._excess = torch.compile(excess, dynamic=True)
        self._distance = torch.compile(distance, dynamic=True)

    def compare(
        self,
        logits: torch.Tensor | None,
        states: Sequence[torch.Tensor],
        batch: Mapping[str, torch.Tensor],
        label_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Read the same lessons as text, and compare.

        Args:
            logits: `(labels, vocabulary)` of the student, at the answer tokens of the batch, those
                of lessons with a teacher first; None: what the teacher answers is not compared.
            states: What `recording` found in the student's `matched_layers`; empty: the teacher's
                are not compared.
            batch: `teacher_input_ids`, `teacher_attention_mask`, `teacher_labels`, each `(batch,
                tokens)`: the same answers behind documents as text. With states also
                `teacher_matched` and `teacher_matched_prompt`, where the tokens stand that both
                read, in the teacher's and the student's prompts, and the latter's
                `decoder_attention_mask`.
            label_weights: `(batch, tokens)` what each of these labels weighs; None: 1.

        Returns:
            By how much the teacher's loss exceeds the labels', over the taught answers: a share of
            it, added to the labels' loss, gives the teacher that share of the loss. And the mean
            `distance` of the states. None for what is not compared.
        """
        labels = batch["teacher_labels"]
        assert self.model.decoder is not None
        layers = self.matched_layers if states else ()
        with torch.no_grad(), recording(self.model.decoder.base_model, layers) as known:
            output = self.model(
                decoder_input_ids=batch["teacher_input_ids"],
                decoder_attention_mask=batch["teacher_attention_mask"],
                labels=labels,
            )
        excess = distance = None
        if logits is not None:
            learned = labels != IGNORED
            taught = send(labels[learned], logits.device)
            weights = None if label_weights is None else send(label_weights[learned], logits.device)
            excess = self._excess(logits[: len(output.logits)], output.logits, taught, weights)
        if states:
            own = _read(states, batch["teacher_matched_prompt"], batch["decoder_attention_mask"])
            theirs = _read(known, batch["teacher_matched"], batch["teacher_attention_mask"])
            pairs = zip(own, theirs, strict=True)
            distance = torch.stack([self._distance(mine, wanted) for mine, wanted in pairs]).mean()
        return excess, distance


@contextmanager
def recording(backbone: Any, layers: Sequence[int]) -> Iterator[list[torch.Tensor]]:  # noqa: ANN401
    """Keep what these layers of a backbone give, in their order.

    `(1, T, hidden)` each of packed rows, `(batch, tokens, hidden)` of padded ones.
    """
    states: list[torch.Tensor] = []

    def keep(_layer: nn.Module, _arguments: object, output: Any) -> None:  # noqa: ANN401
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [backbone.layers[index].register_forward_hook(keep) for index in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def distance(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the summed absolute difference of `(n, hidden)` states, over the size of the wanted.

    >>> distance(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]]))
    tensor(0.2500)
    """
    wanted = wanted.float()
    return (states.float() - wanted).abs().sum() / wanted.abs().sum().clamp_min(1e-6)


def excess(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the summed Kullback-Leibler divergence from a teacher, less the labels' cross entropy.

    Args:
        logits: `(tokens, vocabulary)`.
        teacher_logits: `(tokens, vocabulary)`.
        labels: `(tokens,)`.
        weights: `(tokens,)`; None: 1.

    >>> excess(torch.tensor([[2.0, 2.0]]), torch.tensor([[3.0, 3.0]]), torch.tensor([1]))
    tensor(-0.6931)
    """
    # From one softmax over the vocabulary, which is what takes the time and the memory.
    own = logits.float().log_softmax(-1)
    divergence = nn.functional.kl_div(
        own, teacher_logits.float().log_softmax(-1), reduction="none", log_target=True
    )
    each = divergence.sum(-1) + own.gather(1, labels[:, None])[:, 0]
    return (each if weights is None else each * weights).sum()


def _read(
    states: Sequence[torch.Tensor], marked: torch.Tensor, mask: torch.Tensor
) -> list[torch.Tensor]:
    """Return each layer's states of the marked tokens of a batch that is padded on the right."""
    if states[0].shape[:2] != mask.shape:
        marked = marked[mask.bool()]  # They were packed.
    index = send(marked.flatten().nonzero().squeeze(1), states[0].device)
    return [each.flatten(0, 1).index_select(0, index) for each in states]


def _shape(model: SoftRAGModel) -> tuple[int, int]:
    assert model.decoder is not None
    return len(model.decoder.base_model.layers), model.decoder.config.hidden_size


def _tokens(model: SoftRAGModel) -> tuple[int, list[int]]:
    assert model.decoder_tokenizer is not None
    return len(model.decoder_tokenizer), encode_text(model.decoder_tokenizer, _PROBE)
