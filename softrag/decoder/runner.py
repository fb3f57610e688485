"""The device's side of decoding: one forward pass over running rows and new prompts together.

All tensors that a pass reads stay where they are, so that a pass of known shape is one CUDA graph.
The host sends what changed and never waits: chosen tokens come back through pinned memory. It
knows no requests' texts and decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from softrag.decoder.cache import PAGE, PagePool, pages_for
from softrag.decoder.resident import ResidentMemories
from softrag.decoder.sampling import NO_BIASES, Biases, choose, log_probabilities
from softrag.fused import FusedBackbone
from softrag.fused.graphs import GraphSet
from softrag.memory import Memory
from softrag.packing import can_capture, send, working_on

LARGEST_CAPTURED = 2048
"""Prompt tokens of the largest pass that is captured; larger ones keep the device busy anyway."""


class NewRow(NamedTuple):
    """A prompt to read.

    Attributes:
        input_ids: Of the prompt; any id at soft tokens.
        at_memory: Where its soft tokens stand.
        memories: What stands there, in order.
        pages: Enough for the prompt and its answer.
        temperature: Of sampling; 0.0 takes the likeliest token.
        seed: Of sampling.
        with_state: Whether the halfway state of its last token is wanted.
    """

    input_ids: Sequence[int]
    at_memory: Sequence[int]
    memories: Sequence[Memory]
    pages: Sequence[int]
    temperature: float
    seed: int
    with_state: bool = False


class Chosen:
    """What a pass chose, once the device has got there; running rows first, then new ones.

    Args:
        tokens: `(rows,)`.
        logprobs: `(rows,)` their log-probabilities.
        states: `(new rows, hidden)` halfway states of the prompts' last tokens; None: not wanted.
    """

    def __init__(
        self, tokens: torch.Tensor, logprobs: torch.Tensor, states: torch.Tensor | None
    ) -> None:
        self._event: torch.cuda.Event | None = None
        # Token ids are exact in float64, and one copy is cheaper than two.
        self._both = _to_host(torch.stack([tokens.double(), logprobs.double()]))
        self._states = None if states is None else _to_host(states.float())
        if tokens.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> tuple[list[int], list[float], torch.Tensor | None]:
        """Return tokens, log-probabilities and states on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._both[0].long().tolist(), self._both[1].tolist(), self._states


class _Output(NamedTuple):
    """What a pass writes; see `Chosen`. Rows of spare places are among them."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    states: torch.Tensor | None


class StepRunner:
    """Runs passes over at most `batch_size` rows, which stand in places 0, 1, ….

    Args:
        backbone: The decoder's.
        embeddings: The decoder's input embeddings.
        head: The decoder's output layer.
        batch_size: Most rows.
        cache_tokens: Tokens whose keys and values are kept.
        memory_bytes: Of hot memories that stay on the device.
        capture: Whether passes become CUDA graphs.
    """

    def __init__(
        self,
        backbone: FusedBackbone,
        embeddings: nn.Module,
        head: nn.Linear,
        *,
        batch_size: int,
        cache_tokens: int,
        memory_bytes: int,
        capture: bool,
    ) -> None:
        self.backbone = backbone
        self.batch_size = batch_size
        self.rows = 0
        self.pool = PagePool(
            layers=len(backbone.layers),
            kv_heads=backbone.kv_heads,
            head_dim=backbone.head_dim,
            pages=pages_for(cache_tokens),
            dtype=backbone.dtype,
            device=backbone.device,
        )
        self._resident = ResidentMemories(
            memory_bytes, hidden=backbone.hidden, dtype=backbone.dtype, device=backbone.device
        )
        self._embeddings = embeddings
        self._head = head
        self._graphs = GraphSet(backbone.device) if capture else None
        self._capture_prompts = capture and can_capture(backbone.dtype)
        self._sampling: list[bool] = []
        self._longest: list[int] = []
        device = backbone.device
        # Of each place: next token, its position, seed of sampling.
        self._tokens, self._positions, self._seeds = torch.zeros(
            (3, batch_size), dtype=torch.long, device=device
        )
        self._temperature = torch.zeros(batch_size, device=device)
        self._tables = torch.zeros(
            (batch_size, pages_for(backbone.max_length + 1)), dtype=torch.int32, device=device
        )
        self._prompt = _PromptBuffers(backbone) if self._capture_prompts else None
        # Of running rows and those that join, `(rows, vocabulary)`; made when first needed.
        self._biases: torch.Tensor | None = None

    # ------------------------------------------------------------------ places

    def drop(self, keep: Sequence[int]) -> None:
        """Keep the rows in some places; they move to places 0, 1, … in the order given."""
        moved = [(new, old) for new, old in enumerate(keep) if new != old]
        if moved:
            both = _to_device([list(pair) for pair in zip(*moved, strict=True)], self.backbone)
            for tensor in self._places():
                tensor[both[0]] = tensor[both[1]]
        for tensor in self._places():
            tensor[len(keep) : self.rows] = 0
        self._sampling = [self._sampling[place] for place in keep]
        self._longest = [self._longest[place] for place in keep]
        self.rows = len(keep)

    def _places(self) -> tuple[torch.Tensor, ...]:
        """Return what is kept of each place, `(batch_size, …)` each."""
        return self._tokens, self._positions, self._seeds, self._temperature, self._tables

    # ------------------------------------------------------------------ passes

    @torch.no_grad()
    def step(self, new: Sequence[NewRow], biases: Biases = NO_BIASES) -> Chosen:
        """Choose the next token of every running row and the first of every new one.

        New rows take the places behind the running ones.

        Args:
            new: Rows that join.
            biases: Added to the logits of running and new rows.
        """
        with working_on(self.backbone.device):
            return self._step(new, biases)

    def _step(self, new: Sequence[NewRow], biases: Biases) -> Chosen:
        running = self.rows
        prompt = self._stage(new) if new else None
        sampling = any(self._sampling) or any(row.temperature for row in new)
        places = running
        if self._graphs is not None:
            places = _bucket(running, self.batch_size, mixed=bool(new))
        added = None
        if biases.rows:
            # Behind the running rows stand the spare places.
            rows = [row if row < running else row + places - running for row in biases.rows]
            all_rows = places + (len(prompt.last) if prompt else 0)
            added = self._added(biases._replace(rows=rows), all_rows)
        if self._graphs is not None and (prompt is None or prompt.captured):
            key = (places, prompt.shape if prompt else None, sampling, added is not None)
            out = self._graphs.run(key, lambda: self._pass(places, prompt, sampling, added))
        else:
            out = self._pass(places, prompt, sampling, added)
        if running:
            # Here and not in the pass, because a pass may be done twice before it counts.
            self._tokens[:running] = out.tokens[:running]
            self._positions[:running] += 1
            self._longest = [length + 1 for length in self._longest]
        if prompt is not None:
            self._add(new, out.tokens[places : places + len(new)], prompt)
        tokens, logprobs = (
            torch.cat([part[:running], part[places : places + len(new)]])
            for part in (out.tokens, out.logprobs)
        )
        states = out.states
        if states is not None:
            states = states[: len(new)] if any(row.with_state for row in new) else None
        return Chosen(tokens, logprobs, states)

    def _added(self, biases: Biases, rows: int) -> torch.Tensor:
        """Return biases as `(rows, vocabulary)` logits to add, always in the same place."""
        if self._biases is None:
            most = self.batch_size + max(self.batch_size, _rows_of(LARGEST_CAPTURED))
            self._biases = torch.zeros(
                (most, self._head.out_features),
                dtype=self.backbone.dtype,
                device=self.backbone.device,
            )
        added = self._biases[:rows]
        added.zero_()
        biases.write(added)
        return added

    def _pass(
        self, places: int, prompt: _Prompt | None, sampling: bool, added: torch.Tensor | None
    ) -> _Output:
        """Choose tokens for `places` rows and for the prompts."""
        tokens, positions, seeds, temperature, tables = (
            tensor[:places] for tensor in self._places()
        )
        lengths = positions + 1
        number = tables.gather(1, (positions // PAGE)[:, None])[:, 0]
        slots = number * PAGE + positions % PAGE
        x = self._embeddings(tokens)
        if prompt is not None:
            x = torch.cat([x, prompt.embeddings])
            positions = torch.cat([positions, prompt.positions])
            slots = torch.cat([slots, prompt.slots])
        longest = max(self._longest, default=0) + 1

        def attend(number: int, qkv: torch.Tensor) -> torch.Tensor:
            backbone, pool = self.backbone, self.pool
            keys, values = pool.keys[number], pool.values[number]
            backbone.rotate(number, qkv, positions, keys, values, slots)
            parts = []
            if places:
                parts.append(
                    backbone.ops.decode_attention(
                        qkv[:places], keys, values, tables, lengths,
                        backbone.scale, backbone.heads, longest,
                    )
                )  # fmt: skip
            if prompt is not None:
                parts.append(
                    backbone.attend_packed(qkv[places:], prompt.cu_seq_lens, prompt.longest)
                )
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        states, middle = self.backbone.forward(x, attend)
        prompt_states = None
        if prompt is not None:
            prompt_states = middle[places:][prompt.last]
            states = torch.cat([states[:places], states[places:][prompt.last]])
            temperature = torch.cat([temperature, prompt.temperature])
            seeds = torch.cat([seeds, prompt.seeds])
            lengths = torch.cat([lengths, prompt.lengths])
        logits = self._head(states)
        favoured = logits if added is None else logits + added
        if sampling:
            chosen = choose(favoured, temperature, seeds, lengths)
        else:
            chosen = favoured.argmax(-1)
        return _Output(chosen, log_probabilities(logits, chosen), prompt_states)

    # ------------------------------------------------------------------ prompts

    def _stage(self, new: Sequence[NewRow]) -> _Prompt:
        """Send prompts to the device: one copy of numbers, one of soft tokens."""
        lengths = [len(row.input_ids) for row in new]
        total = sum(lengths)
        captured = self._capture_prompts and total <= LARGEST_CAPTURED
        width, rows = total, len(new)
        if captured:
            width = _prompt_bucket(total, mixed=self.rows > 0)
            rows = _rows_of(width)
            captured = len(new) <= rows
            if not captured:
                width, rows = total, len(new)
        padding, spare = width - total, rows - len(new)
        at_memory, start = [], 0
        for row in new:
            at_memory += [start + at for at in row.at_memory]
            start += len(row.input_ids)
        ends = torch.tensor(lengths).cumsum(0).tolist()
        fields = {
            "ids": [i for row in new for i in row.input_ids] + [0] * padding,
            "positions": [p for length in lengths for p in range(length)] + [0] * padding,
            "slots": [
                row.pages[p // PAGE] * PAGE + p % PAGE
                for row, length in zip(new, lengths, strict=True)
                for p in range(length)
            ]
            + [0] * padding,
            # What pads is a sequence of its own, the last; spare rows are empty sequences.
            "borders": [0, *ends, *[total] * spare, *([width] if captured else [])],
            "last": [end - 1 for end in ends] + [0] * spare,
            "lengths": lengths + [1] * spare,
            "seeds": [row.seed for row in new] + [0] * spare,
            "at_memory": at_memory,
        }
        sent = _to_device([n for values in fields.values() for n in values], self.backbone)
        part = dict(zip(fields, sent.split([len(v) for v in fields.values()]), strict=True))
        embeddings = self._embeddings(part["ids"])
        if at_memory:
            soft_tokens = self._resident.gather([memory for row in new for memory in row.memories])
            embeddings.index_copy_(0, part["at_memory"], soft_tokens)
        temperature = torch.tensor([row.temperature for row in new] + [0.0] * spare)
        prompt = _Prompt(
            embeddings=embeddings,
            positions=part["positions"],
            slots=part["slots"],
            cu_seq_lens=part["borders"].to(torch.int32),
            last=part["last"],
            lengths=part["lengths"],
            seeds=part["seeds"],
            temperature=send(temperature, embeddings.device),
            longest=width if captured else max(lengths),
            captured=captured,
        )
        return self._prompt.fill(prompt) if captured and self._prompt else prompt

    def _add(self, new: Sequence[NewRow], tokens: torch.Tensor, prompt: _Prompt) -> None:
        """Let new rows run, behind the others."""
        places = slice(self.rows, self.rows + len(new))
        count = slice(0, len(new))
        self._tokens[places] = tokens
        self._positions[places] = prompt.lengths[count]
        self._seeds[places] = prompt.seeds[count]
        self._temperature[places] = prompt.temperature[count]
        widest = max(len(row.pages) for row in new)
        tables = [[*row.pages, *[0] * (widest - len(row.pages))] for row in new]
        self._tables[places, :widest] = _to_device(tables, self.backbone).to(torch.int32)
        self._sampling += [row.temperature > 0 for row in new]
        self._longest += [len(row.input_ids) for row in new]
        self.rows += len(new)


class _Prompt(NamedTuple):
    """Prompts on the device; T tokens, R rows."""

    embeddings: torch.Tensor  # (T, hidden)
    positions: torch.Tensor  # (T,)
    slots: torch.Tensor  # (T,)
    cu_seq_lens: torch.Tensor  # (R + 1,), one more where padding is a sequence
    last: torch.Tensor  # (R,) each row's last token
    lengths: torch.Tensor  # (R,)
    seeds: torch.Tensor  # (R,)
    temperature: torch.Tensor  # (R,)
    longest: int
    captured: bool

    @property
    def shape(self) -> int:
        """What decides the shapes of all of them."""
        return len(self.embeddings)


class _PromptBuffers:
    """Where captured passes find their prompts."""

    def __init__(self, backbone: FusedBackbone) -> None:
        tokens, rows, device = LARGEST_CAPTURED, _rows_of(LARGEST_CAPTURED), backbone.device
        self._whole = _Prompt(
            embeddings=torch.zeros((tokens, backbone.hidden), dtype=backbone.dtype, device=device),
            positions=torch.zeros(tokens, dtype=torch.long, device=device),
            slots=torch.zeros(tokens, dtype=torch.long, device=device),
            cu_seq_lens=torch.zeros(rows + 2, dtype=torch.int32, device=device),
            last=torch.zeros(rows, dtype=torch.long, device=device),
            lengths=torch.zeros(rows, dtype=torch.long, device=device),
            seeds=torch.zeros(rows, dtype=torch.long, device=device),
            temperature=torch.zeros(rows, device=device),
            longest=0,
            captured=True,
        )

    def fill(self, prompt: _Prompt) -> _Prompt:
        """Copy a prompt into the buffers and return it there."""
        parts = {}
        for name, value in prompt._asdict().items():
            if isinstance(value, torch.Tensor):
                buffer = getattr(self._whole, name)[: len(value)]
                buffer.copy_(value)
                parts[name] = buffer
        return prompt._replace(**parts)


def _to_device(numbers: list, backbone: FusedBackbone) -> torch.Tensor:
    """Send whole numbers to the device without waiting for it."""
    return send(torch.tensor(numbers, dtype=torch.long), backbone.device)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the CPU; from a GPU without waiting, into pinned memory."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _bucket(rows: int, most: int, *, mixed: bool) -> int:
    """Return the number of places captured for some rows: few shapes, little waste.

    Beside prompts even fewer: there are shapes for each number of prompt tokens too, and a spare
    row costs next to nothing there.
    """
    if mixed and rows:
        return min(most, next((step for step in (4, 16, 64) if rows <= step), -(-rows // 64) * 64))
    if rows <= 2:
        return rows
    step = 4 if rows <= 8 else 8 if rows <= 64 else 32
    return min(most, -(-rows // step) * step)


def _prompt_bucket(tokens: int, *, mixed: bool) -> int:
    """Return the tokens captured for some prompts; fewer shapes where rows run beside them."""
    if mixed:
        return max(64, 1 << (tokens - 1).bit_length())
    step = 32 if tokens <= 256 else 64 if tokens <= 1024 else 256
    return -(-tokens // step) * step


def _rows_of(width: int) -> int:
    """Return the prompts that a captured pass has room for."""
    return max(1, width // 32)
