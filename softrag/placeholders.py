"""Where memory tokens stand among others, and which text is whose. It knows nothing of models."""

from __future__ import annotations

from typing import NamedTuple

import torch

from softrag.packing import Packed, send


class Windows:
    """Which text tokens belong to each memory token: equal windows of its row.

    Args:
        members: `(memory, widest)` which text tokens a window holds; 0 beyond its `count`.
        count: `(memory,)` tokens of each window.
        end: `(memory,)` position of each window's last token.
    """

    def __init__(self, members: torch.Tensor, count: torch.Tensor, end: torch.Tensor) -> None:
        self.members = members
        self.count = count
        self.end = end

    @classmethod
    def of(
        cls, packed: Packed, is_memory: torch.Tensor, at_text: torch.Tensor, at_memory: torch.Tensor
    ) -> Windows:
        """Lay windows out.

        Args:
            packed: The rows; T tokens in all.
            is_memory: `(T,)` where the memory tokens stand.
            at_text: `(text,)` places of the text tokens.
            at_memory: `(memory,)` places of the memory tokens.
        """
        rows = len(packed.lengths)
        zeros = torch.zeros(rows, dtype=torch.long, device=is_memory.device)
        per_row = zeros.index_add(0, packed.row, is_memory.long())
        first = per_row.cumsum(0) - per_row
        row = packed.row[at_text]
        text_per_row = zeros.index_add(0, row, torch.ones_like(row))
        # Rank among the row's text tokens; the memory tokens may stand anywhere.
        number = torch.arange(len(at_text), device=row.device)
        rank = number - (text_per_row.cumsum(0) - text_per_row)[row]
        # A row without placeholders is read but owns no window.
        share = (rank * per_row[row]) // text_per_row[row].clamp_min(1)
        owner = torch.where(per_row[row] > 0, first[row] + share, len(at_memory))
        # The text without a window gets one behind all others, which is thrown away.
        extra = zeros.new_zeros(len(at_memory) + 1)
        count = extra.index_add(0, owner, torch.ones_like(owner))[:-1]
        end = extra.scatter_reduce(0, owner, packed.position[at_text], "amax")[:-1]
        begin = extra.scatter_reduce(0, owner, number, "amin", include_self=False)[:-1]
        step = torch.arange(int(count.max()) if len(count) else 0, device=row.device)
        members = torch.where(step < count[:, None], begin[:, None] + step, 0)
        return cls(members, count, end)

    def to(self, device: torch.device) -> Windows:
        """Return the windows on a device."""
        return Windows(*(send(part, device) for part in (self.members, self.count, self.end)))

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Average `(text, hidden)` over each window: `(memory, hidden)`; 0 for an empty window."""
        # Picked and summed, in float32 and in order; adding each value to its window would make a
        # GPU's results differ from run to run.
        picked = values.index_select(0, self.members.flatten())
        picked = picked.view(*self.members.shape, values.shape[-1])
        step = torch.arange(self.members.shape[1], device=values.device)
        beyond = (step >= self.count[:, None])[..., None]
        wide = torch.promote_types(values.dtype, torch.float32)
        total = picked.masked_fill(beyond, 0.0).sum(1, dtype=wide)
        return (total / self.count.clamp_min(1)[:, None]).to(values.dtype)


class Placeholders(NamedTuple):
    """What stands where in packed documents; T tokens in all.

    Attributes:
        words: `(T,)` token ids, with 0, a word like any other, in the place of added tokens.
        memory: `(memory,)` places of the memory tokens.
        which: `(memory,)` which of the memory tokens each is.
        rerank: `(documents,)` places of the rerank tokens; None without them.
        text: `(text,)` places of all other tokens; None where windows are not asked for.
        windows: Which text belongs to which memory token; None where they are not asked for.
    """

    words: torch.Tensor
    memory: torch.Tensor
    which: torch.Tensor
    rerank: torch.Tensor | None
    text: torch.Tensor | None
    windows: Windows | None

    @classmethod
    def find(
        cls,
        ids: torch.Tensor,
        packed: Packed,
        *,
        memory_ids: list[int],
        rerank_id: int | None,
        windows: bool,
    ) -> Placeholders:
        """Look through `(T,)` ids of packed documents; on the CPU nothing waits for a GPU."""
        is_memory, which = find_tokens(ids, memory_ids)
        is_text = ~is_memory
        rerank = None
        if rerank_id is not None:
            is_rerank = ids == rerank_id
            is_text &= ~is_rerank
            rerank = is_rerank.nonzero().squeeze(1)
        memory = is_memory.nonzero().squeeze(1)
        words = torch.where(is_text, ids, 0)
        if not windows:
            return cls(words, memory, which[memory], rerank, None, None)
        text = is_text.nonzero().squeeze(1)
        whose = Windows.of(packed, is_memory, text, memory)
        return cls(words, memory, which[memory], rerank, text, whose)

    def to(self, device: torch.device) -> Placeholders:
        """Return the places on a device."""
        return Placeholders(
            send(self.words, device),
            send(self.memory, device),
            send(self.which, device),
            None if self.rerank is None else send(self.rerank, device),
            None if self.text is None else send(self.text, device),
            None if self.windows is None else self.windows.to(device),
        )


def find_tokens(ids: torch.Tensor, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tell where any of these tokens stand, and which of them; both in the shape of `ids`."""
    if len(tokens) == 1:  # The common case waits for no copy to the device.
        return ids == tokens[0], torch.zeros_like(ids)
    found = ids[..., None] == torch.tensor(tokens, device=ids.device)
    return found.any(dim=-1), found.int().argmax(dim=-1)


def expand_spans(counts: torch.Tensor, use: torch.Tensor) -> torch.Tensor:
    """Return the soft token indices of documents in the order they are used.

    >>> expand_spans(torch.tensor([2, 3]), torch.tensor([1, 0, 1]))
    tensor([2, 3, 4, 0, 1, 2, 3, 4])
    """
    first = counts.cumsum(0) - counts
    lengths = counts[use]
    starts = first[use].repeat_interleave(lengths)
    before = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return starts + torch.arange(len(starts), device=counts.device) - before
