"""Hot memories on the device: those used last, up to a number of bytes. It knows no requests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from softrag.memory import Memory
from softrag.packing import send


class _Resident(NamedTuple):
    values: torch.Tensor
    rows: list[int]


class ResidentMemories:
    """Soft tokens in one block of device memory, the memory used longest ago replaced first.

    A memory is known again by the very tensor that holds its values, not by its key: the same
    document may come from stores with different codecs. Caches of the host (`MemoryCache`) give
    the same tensor each time.

    Args:
        max_bytes: Of the block.
        hidden: Width of a soft token.
        dtype: Of the block: the decoder's.
        device: Of the block.
    """

    def __init__(
        self, max_bytes: int, *, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._rows = max_bytes // (hidden * dtype.itemsize)
        self._block = torch.empty((self._rows, hidden), dtype=dtype, device=device)
        self._free = list(range(self._rows))
        self._memories: OrderedDict[int, _Resident] = OrderedDict()  # by id of the tensor

    def __len__(self) -> int:
        """Return the number of memories in the block."""
        return len(self._memories)

    def gather(self, memories: Sequence[Memory]) -> torch.Tensor:
        """Return `(soft tokens, hidden)` of some memories in order, on the device.

        What is not there yet is sent in one copy through pinned memory, and stays.
        """
        distinct = {id(memory.values): memory.values for memory in memories}
        if sum(map(len, distinct.values())) > self._rows:
            values = torch.cat([memory.values.to(self._block.dtype) for memory in memories])
            return send(values, self._block.device)
        # First touch what is wanted, so that making room evicts none of it.
        missing = []
        for key, values in distinct.items():
            if key in self._memories:
                self._memories.move_to_end(key)
            else:
                missing.append(values)
        if missing:
            self._take_in(missing)
        rows = [row for memory in memories for row in self._memories[id(memory.values)].rows]
        return self._block[send(torch.tensor(rows), self._block.device)]

    def _take_in(self, missing: list[torch.Tensor]) -> None:
        rows: list[int] = []
        for values in missing:
            while len(self._free) < len(values):
                self._free += self._memories.popitem(last=False)[1].rows
            taken = self._free[-len(values) :]
            del self._free[-len(values) :]
            # Holding the tensor keeps its id its own.
            self._memories[id(values)] = _Resident(values, taken)
            rows += taken
        together = torch.cat([values.to(self._block.dtype) for values in missing])
        device = self._block.device
        self._block.index_copy_(0, send(torch.tensor(rows), device), send(together, device))
