"""Learning from a decoder that reads the documents as text, token by token.

A label says which token was right; the teacher says how likely every token was to a reader of the
whole text. Only answer tokens are compared. It knows no collator and no training loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from softrag.model import SoftRAGModel
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
        self._divergence: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = divergence

    def compile(self) -> None:
        """Compile what takes the time (CUDA training)."""
        self.model.compile_layers()
        self._divergence = torch.compile(divergence, dynamic=True)

    def compare(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the summed divergence of a student from the teacher.

        Args:
            logits: `(labels, vocabulary)` of the student, at the answer tokens of the batch.
            batch: `teacher_input_ids`, `teacher_attention_mask`, `teacher_labels`, each `(batch,
                tokens)`: the same answers behind documents as text.
        """
        with torch.no_grad():
            output = self.model(
                decoder_input_ids=batch["teacher_input_ids"],
                decoder_attention_mask=batch["teacher_attention_mask"],
                labels=batch["teacher_labels"],
            )
        return self._divergence(logits, output.logits)


def divergence(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Return the summed Kullback-Leibler divergence of two `(tokens, vocabulary)` logits.

    >>> divergence(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
    tensor(0.)
    """
    return nn.functional.kl_div(
        logits.float().log_softmax(-1),
        teacher_logits.float().log_softmax(-1),
        reduction="sum",
        log_target=True,
    )


def _tokens(model: SoftRAGModel) -> tuple[int, list[int]]:
    assert model.decoder_tokenizer is not None
    return len(model.decoder_tokenizer), encode_text(model.decoder_tokenizer, _PROBE)
