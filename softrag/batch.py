"""Rows of token ids to padded tensors. It knows nothing of texts or models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from softrag.prompt import DocumentRow, PromptRow

IGNORED = -100
"""Label of positions that are not learned (PyTorch's cross entropy ignores it)."""


class CompressorBatch(NamedTuple):
    """What the compressor reads; both tensors are `(documents, tokens)`."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor


class DecoderBatch(NamedTuple):
    """What the decoder reads; all tensors are `(batch, tokens)`, `labels` None when asking."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor | None


def collate_documents(rows: Sequence[DocumentRow], pad_token_id: int) -> CompressorBatch:
    """Pad documents on the right.

    >>> row = DocumentRow([5, 6, 9], n_memory=1, n_document_tokens=2, truncated=False)
    >>> collate_documents([row, row._replace(input_ids=[7, 9])], pad_token_id=0).input_ids
    tensor([[5, 6, 9],
            [7, 9, 0]])
    """
    return CompressorBatch(*_pad([row.input_ids for row in rows], pad_token_id, side="right"))


def collate_prompts(
    rows: Sequence[PromptRow],
    pad_token_id: int,
    *,
    side: Literal["left", "right"],
    learn: bool = False,
) -> DecoderBatch:
    """Pad prompts; with `learn`, label the answer tokens.

    Pad on the left to generate, so that every answer starts in the same column.

    >>> batch = collate_prompts([PromptRow([5, 6, 7], 2), PromptRow([8, 9], 1)], 0,
    ...                         side="right", learn=True)
    >>> batch.labels
    tensor([[-100, -100,    7],
            [-100,    9, -100]])
    """
    input_ids, mask = _pad([row.input_ids for row in rows], pad_token_id, side=side)
    if not learn:
        return DecoderBatch(input_ids, mask, None)
    answers = [[IGNORED] * row.answer_start + row.input_ids[row.answer_start :] for row in rows]
    labels, _ = _pad(answers, IGNORED, side=side)
    return DecoderBatch(input_ids, mask, labels)


def _pad(
    rows: Sequence[Sequence[int]], fill: int, *, side: Literal["left", "right"]
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max((len(row) for row in rows), default=0)
    values = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        values[index, span] = torch.tensor(row, dtype=torch.long)
        mask[index, span] = 1
    return values, mask
