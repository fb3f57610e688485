"""The Hugging Face model as it is, for what can't run fused: one batch after the other.

Rows that end leave the batch; nobody joins before it is over. It knows no texts.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from softrag.batch import collate_prompts
from softrag.decoder.row import Row, biases_of
from softrag.decoder.sampling import log_probabilities
from softrag.decoder.turns import Turns
from softrag.model import SoftRAGModel


class EagerEngine:
    """Runs batches of rows through a loaded model.

    Args:
        model: Its adapters are merged.
        end_ids: Tokens that end an answer.
        pad_id: What fills short prompts.
        batch_size: Most rows in a batch.
        batch_tokens: Most prompt tokens in a batch, padding included.
        lock: Held during every forward pass.
    """

    def __init__(
        self,
        model: SoftRAGModel,
        *,
        end_ids: set[int],
        pad_id: int,
        batch_size: int,
        batch_tokens: int,
        lock: threading.Lock,
    ) -> None:
        self._model = model
        self._decoder: Any = model.decoder
        self._end_ids = end_ids
        self._pad_id = pad_id
        self._batch_size = batch_size
        self._batch_tokens = batch_tokens
        self._lock = lock
        self._batch: _Batch | None = None
        self._turns = Turns(self._advance)

    def finish(self, rows: Sequence[Row]) -> None:
        """Decode rows until all are done."""
        # Rows of like length pad each other least.
        self._turns.finish(sorted(rows, key=lambda row: -len(row.prompt.input_ids)))

    def stream(self, row: Row) -> Iterator[str]:
        """Decode one row, in pieces of text."""
        return self._turns.stream(row)

    def _advance(self) -> None:
        rows = [] if self._batch is None else self._batch.rows
        try:
            if self._batch is not None:
                self._leave(self._batch)
            if self._batch is None:
                rows = self._take()
                if not rows:
                    return
                self._batch = self._prefill(rows)
            else:
                self._step(self._batch)
            self._push(self._batch)
        except BaseException as error:
            for row in rows:
                if not row.done:
                    row.error = error
                    row.wake()
            self._batch = None
            raise

    def _take(self) -> list[Row]:
        rows: list[Row] = []
        waiting = self._turns.waiting
        width = 0
        while waiting and len(rows) < self._batch_size:
            width = max(width, len(waiting[0].prompt.input_ids))
            if rows and width * (len(rows) + 1) > self._batch_tokens:
                break
            row = waiting.popleft()
            if not row.cancelled:
                rows.append(row)
        return rows

    def _leave(self, batch: _Batch) -> None:
        """Let rows that ended leave the batch."""
        going = [
            place for place, row in enumerate(batch.rows) if not row.done and not row.cancelled
        ]
        if not going:
            self._batch = None
        elif len(going) < len(batch.rows):
            keep = torch.tensor(going, device=batch.mask.device)
            batch.rows = [batch.rows[place] for place in going]
            batch.tokens = [batch.tokens[place] for place in going]
            batch.cache.batch_select_indices(keep)
            batch.mask = batch.mask[keep]

    def _push(self, batch: _Batch) -> None:
        biased = biases_of(batch.rows).added_to(batch.logits)
        greedy = biased.argmax(-1).tolist()
        batch.tokens = [
            row.sample(logits) if row.request.temperature else token
            for row, logits, token in zip(batch.rows, biased, greedy, strict=True)
        ]
        chosen = torch.tensor(batch.tokens, device=batch.logits.device)
        logprobs = log_probabilities(batch.logits, chosen).tolist()
        for row, token, logprob in zip(batch.rows, batch.tokens, logprobs, strict=True):
            row.push(token, logprob, self._end_ids)
            if row.done or row.has_delta:
                row.wake()

    @torch.no_grad()
    def _prefill(self, rows: list[Row]) -> _Batch:
        device = self._model.device
        memories = [memory.values for row in rows for memory in row.memories]
        # Pad on the left, so that every answer begins at the same place.
        batch = collate_prompts([row.prompt for row in rows], self._pad_id, side="left")
        mask = batch.attention_mask.to(device)
        cache = DynamicCache(config=self._decoder.config)
        soft_tokens = (
            torch.cat(memories) if memories else torch.zeros(0, self._decoder.config.hidden_size)
        )  # (soft tokens of all rows, hidden)
        with self._lock, _watch_middle(self._decoder) as states:
            logits = self._decoder(
                inputs_embeds=self._model.embed_prompt(
                    batch.input_ids.to(device), mask, soft_tokens.to(device)
                ),
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        if any(row.request.with_state for row in rows):
            for row, state in zip(rows, states[0].float().cpu(), strict=True):
                row.prompt_state = state if row.request.with_state else None
        return _Batch(rows, cache, mask, logits[:, -1])

    @torch.no_grad()
    def _step(self, batch: _Batch) -> None:
        """Feed the chosen tokens and keep the next logits."""
        batch.mask = torch.cat([batch.mask, batch.mask.new_ones(len(batch.rows), 1)], dim=1)
        with self._lock:
            batch.logits = self._decoder(
                input_ids=torch.tensor(batch.tokens, device=batch.mask.device)[:, None],
                attention_mask=batch.mask,
                position_ids=batch.mask.sum(-1, keepdim=True) - 1,
                past_key_values=batch.cache,
                use_cache=True,
            ).logits[:, -1]


@contextmanager
def _watch_middle(decoder: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collect the last token's state halfway through the layers, `(rows, hidden)` per forward."""
    states: list[torch.Tensor] = []
    layers: Any = decoder.base_model.layers
    hook = layers[len(layers) // 2].register_forward_pre_hook(
        lambda _, arguments: states.append(arguments[0][:, -1])
    )
    try:
        yield states
    finally:
        hook.remove()


class _Batch:
    """Rows on their way together."""

    def __init__(
        self, rows: list[Row], cache: DynamicCache, mask: torch.Tensor, logits: torch.Tensor
    ) -> None:
        self.rows = rows
        self.cache = cache
        self.mask = mask  # (rows, tokens)
        self.logits = logits  # (rows, vocabulary)
        self.tokens: list[int] = []
