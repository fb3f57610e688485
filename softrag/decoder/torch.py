"""The decoder in this process, over Hugging Face models. It knows nothing of stores.

The loop is written out instead of calling `generate`: rows that end leave the batch, every row has
its own stop strings, temperature and seed, and a stream is a plain generator whose `close` stops
the model, with no thread behind it.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from softrag.batch import collate_prompts
from softrag.decoder.base import DecodeRequest, DecodeResult
from softrag.decoder.checks import check_memory
from softrag.decoder.detokenizer import Detokenizer
from softrag.memory import Memory
from softrag.model import SoftRAGModel
from softrag.prompt import PromptRow, RagPrompt


class TorchDecoder:
    """Answers with a loaded model; its decoder adapters are merged into the weights.

    Args:
        model: A model loaded with its decoder.
        batch_tokens: Most prompt tokens decoded together, padding included.
        batch_size: Most requests decoded together.
        lock: Held during every forward pass, not between them, so that a slow reader of one
            stream keeps nobody waiting. Whoever else runs the same model shares it; None for a
            lock of its own.
    """

    def __init__(
        self,
        model: SoftRAGModel,
        *,
        batch_tokens: int = 16384,
        batch_size: int = 64,
        lock: threading.Lock | None = None,
    ) -> None:
        if model.decoder is None or model.decoder_tokenizer is None:
            raise ValueError("The decoder was not loaded; use load_decoder=True.")
        self.model = model
        self.batch_tokens = batch_tokens
        self.batch_size = batch_size
        self.prompt = RagPrompt.from_config(model.config, model.decoder_tokenizer)
        self._end_ids = self.prompt.end_ids
        # What padding holds is masked; some tokenizers have no token for it.
        self._pad_id = self.prompt.tokenizer.pad_token_id or 0
        self._lock = lock or threading.Lock()
        with self._lock:
            model.merge_adapters()
        self._decoder = model.decoder
        self._width: int = model.decoder.config.hidden_size

    @property
    def fingerprint(self) -> str:
        """Of the compressor whose memories this decoder reads."""
        return self.model.fingerprint

    @property
    def joins_requests(self) -> bool:
        """False: only requests of one call are decoded together."""
        return False

    def prompt_tokens(self, question: str, documents: Sequence[Memory | str]) -> int:
        """Count the prompt's tokens without running the model."""
        return len(self._render(question, documents).input_ids)

    def generate(self, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        """Answer requests together; see `Decoder.generate`."""
        rows = [self._row(request) for request in requests]
        for batch in self._batches(rows):
            for _ in self._run(batch):
                pass
        return [row.result() for row in rows]

    def stream(self, request: DecodeRequest) -> Generator[str, None, DecodeResult]:
        """Answer in pieces of text, and return the result; see `Decoder.stream`."""
        row = self._row(request)
        for _ in self._run([row]):
            if row.delta:
                yield row.delta
        return row.result()

    def close(self) -> None:
        """Do nothing: the model goes when nobody holds it."""

    def _render(self, question: str, documents: Sequence[Memory | str]) -> PromptRow:
        return self.prompt.render(
            question,
            [len(document) if isinstance(document, Memory) else document for document in documents],
        )

    def _row(self, request: DecodeRequest) -> _Row:
        for document in request.documents:
            if isinstance(document, Memory):
                check_memory(document, fingerprint=self.fingerprint, width=self._width)
        row = _Row(
            request,
            self._render(request.question, request.documents),
            Detokenizer(self.prompt.tokenizer, request.stop),
        )
        limit = getattr(self._decoder.config, "max_position_embeddings", None)
        wanted = len(row.prompt.input_ids) + request.max_new_tokens
        if limit is not None and wanted > limit:
            raise ValueError(
                f"The prompt has {len(row.prompt.input_ids)} tokens and the answer may have "
                f"{request.max_new_tokens}, but the decoder reads {limit}. Ask with fewer or "
                "shorter documents, or lower max_new_tokens."
            )
        return row

    def _batches(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        batch: list[_Row] = []
        for row in sorted(rows, key=lambda row: -len(row.prompt.input_ids)):
            width = len(batch[0].prompt.input_ids) if batch else 0
            full = len(batch) == self.batch_size or width * (len(batch) + 1) > self.batch_tokens
            if batch and full:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _run(self, rows: list[_Row]) -> Iterator[None]:
        """Decode rows until all are done; yields after every token, when `row.delta` is new."""
        start = perf_counter()
        cache, mask, logits = self._prefill(rows)
        while True:
            tokens, logprobs = _choose(rows, logits)
            elapsed = perf_counter() - start
            for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
                row.push(token, logprob, self._end_ids, elapsed)
            yield
            going = [place for place, row in enumerate(rows) if not row.finish_reason]
            if not going:
                return
            if len(going) < len(rows):
                rows = [rows[place] for place in going]
                tokens = [tokens[place] for place in going]
                keep = torch.tensor(going, device=mask.device)
                cache.batch_select_indices(keep)
                mask = mask[keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)  # (rows, tokens)
            logits = self._step(tokens, cache, mask)

    @torch.no_grad()
    def _prefill(self, rows: list[_Row]) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
        """Return the cache, the mask `(rows, tokens)` and the next logits `(rows, vocabulary)`."""
        device = self.model.device
        memories = [
            document.values
            for row in rows
            for document in row.request.documents
            if isinstance(document, Memory)
        ]
        # Pad on the left, so that every answer begins at the same place.
        batch = collate_prompts([row.prompt for row in rows], self._pad_id, side="left")
        mask = batch.attention_mask.to(device)
        cache = DynamicCache(config=self._decoder.config)
        with self._lock, _watch_middle(self._decoder) as states:
            soft_tokens = (
                torch.cat(memories) if memories else torch.zeros(0, self._width)
            )  # (soft tokens of all rows, hidden)
            logits = self._decoder(
                inputs_embeds=self.model.embed_prompt(
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
        return cache, mask, logits[:, -1]

    @torch.no_grad()
    def _step(self, tokens: list[int], cache: DynamicCache, mask: torch.Tensor) -> torch.Tensor:
        """Feed one token per row and return the next logits, `(rows, vocabulary)`."""
        with self._lock:
            logits = self._decoder(
                input_ids=torch.tensor(tokens, device=mask.device)[:, None],
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            ).logits
        return logits[:, -1]


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


def _choose(rows: list[_Row], logits: torch.Tensor) -> tuple[list[int], list[float]]:
    """Return the next token of every row and its log-probability, from `(rows, vocabulary)`."""
    greedy = logits.argmax(-1)
    tokens = [
        row.sample(row_logits) if row.request.temperature else token
        for row, row_logits, token in zip(rows, logits, greedy.tolist(), strict=True)
    ]
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    logprobs = logits.float().log_softmax(-1).gather(-1, chosen)[:, 0]
    return tokens, logprobs.tolist()


class _Row:
    """One request on its way."""

    def __init__(self, request: DecodeRequest, prompt: PromptRow, detokenizer: Detokenizer) -> None:
        self.request = request
        self.prompt = prompt
        self.delta = ""
        self.finish_reason: str | None = None
        self.prompt_state: torch.Tensor | None = None
        self._logprobs: list[float] = []
        self._detokenizer = detokenizer
        self._first_token_s = 0.0
        self._random = torch.Generator()
        if request.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(request.seed)

    def sample(self, logits: torch.Tensor) -> int:
        """Return a token drawn from `(vocabulary,)` logits at the request's temperature."""
        # On the CPU and with a generator of its own, so that neighbours in the batch and the
        # device change nothing.
        weights = (logits.float().cpu() / self.request.temperature).softmax(-1)
        return int(torch.multinomial(weights, 1, generator=self._random))

    def push(self, token: int, logprob: float, end_ids: set[int], elapsed: float) -> None:
        """Take the chosen token: sets `delta`, and `finish_reason` when it was the last."""
        if not self._logprobs:
            self._first_token_s = elapsed
        self._logprobs.append(logprob)
        ended = token in end_ids
        self.delta = "" if ended else self._detokenizer.push(token)
        if ended or self._detokenizer.stopped:
            self.finish_reason = "stop"
        elif len(self._logprobs) == self.request.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason:
            self.delta += self._detokenizer.finish()

    def result(self) -> DecodeResult:
        """Return the answer so far."""
        return DecodeResult(
            text=self._detokenizer.text,
            prompt_tokens=len(self.prompt.input_ids),
            soft_tokens=sum(
                len(document) for document in self.request.documents if isinstance(document, Memory)
            ),
            completion_tokens=len(self._logprobs),
            first_token_s=self._first_token_s,
            finish_reason="stop" if self.finish_reason == "stop" else "length",
            token_logprobs=tuple(self._logprobs),
            prompt_state=self.prompt_state,
        )
