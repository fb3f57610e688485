"""Keys and values of running requests in pages. It knows no model and no request."""

from __future__ import annotations

import numpy as np
import torch

PAGE = 32
"""Tokens of one page."""


class PagePool:
    """Pages of a fixed memory, given out and taken back by number.

    Page 0 is never given out: padding is written there.

    Args:
        layers: Of the model.
        kv_heads: Key and value heads of a layer.
        head_dim: Width of a head.
        pages: How many to give out.
        dtype: Of keys and values.
        device: Where they are.
    """

    def __init__(
        self,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        pages: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, pages + 1, kv_heads, PAGE, head_dim)
        # Zeros, because what is masked is multiplied by zero, which NaN would survive.
        self.keys, self.values = (_zeros(shape, dtype, device) for _ in range(2))
        self.size = pages
        # Last in, first out: pages touched lately are the ones in memory.
        self._free = list(range(pages, 0, -1))

    @property
    def free(self) -> int:
        """Number of pages that can be taken."""
        return len(self._free)

    @property
    def nbytes(self) -> int:
        """Size of all pages in bytes."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def take(self, count: int) -> list[int]:
        """Return page numbers; the caller has seen that there are enough."""
        assert count <= len(self._free)
        taken = self._free[len(self._free) - count :][::-1]
        del self._free[len(self._free) - count :]
        return taken

    def give_back(self, pages: list[int]) -> None:
        """Take pages back."""
        self._free.extend(reversed(pages))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros cost no memory before they are touched; torch's do.
    raw = np.zeros((*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype)


def pages_for(tokens: int) -> int:
    """Return how many pages hold some tokens."""
    return -(-tokens // PAGE)
