"""Learning from a decoder that reads the documents as text, token by token.

A label says which token was right; the teacher says how likely every token was to a reader of the
whole text. Only answer tokens are compared. It knows no collator and no training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from softrag.batch import IGNORED
from softrag.model import SoftRAGModel
from softrag.packing import send
from softrag.prompt import encode_text

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

    def compile(self) -> None:
        """Compile what takes the time (CUDA training)."""
        self.model.compile_layers()
        self._excess = torch.compile(excess, dynamic=True)

    def exceed(
        self,
        logits: torch.Tensor,
        batch: Mapping[str, torch.Tensor],
        label_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return by how much the teacher's loss exceeds the labels', over the taught answers.

        A share of it, added to the labels' loss, gives the teacher that share of the loss.

        Args:
            logits: `(labels, vocabulary)` of the student, at the answer tokens of the batch, those
                of lessons with a teacher first.
            batch: `teacher_input_ids`, `teacher_attention_mask`, `teacher_labels`, each `(batch,
                tokens)`: the same answers behind documents as text.
            label_weights: `(batch, tokens)` what each of these labels weighs; None: 1.
        """
        labels = batch["teacher_labels"]
        with torch.no_grad():
            output = self.model(
                decoder_input_ids=batch["teacher_input_ids"],
                decoder_attention_mask=batch["teacher_attention_mask"],
                labels=labels,
            )
        learned = labels != IGNORED
        taught = send(labels[learned], logits.device)
        weights = None if label_weights is None else send(label_weights[learned], logits.device)
        return self._excess(logits[: len(output.logits)], output.logits, taught, weights)


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


def _tokens(model: SoftRAGModel) -> tuple[int, list[int]]:
    assert model.decoder_tokenizer is not None
    return len(model.decoder_tokenizer), encode_text(model.decoder_tokenizer, _PROBE)
