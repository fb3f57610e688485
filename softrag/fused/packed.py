"""Packed sequences through a fused backbone, full batches as one CUDA graph."""

from __future__ import annotations

import torch

from softrag.fused.backbone import FusedBackbone
from softrag.fused.graphs import GraphSet
from softrag.packing import can_capture

# Shorter than this a sequence would have to be for a full batch to have no room for its border.
SHORTEST = 32


class PackedRunner:
    """Runs batches of about one size many times over.

    A batch that fills most of `width` tokens is padded to it and replayed as a CUDA graph: one
    shape per kind of longest sequence. All others run as they are.

    Args:
        backbone: What to run.
        width: Tokens of a full batch.
        capture: Whether full batches become CUDA graphs.
    """

    def __init__(self, backbone: FusedBackbone, *, width: int, capture: bool) -> None:
        self.backbone = backbone
        self.width = width
        self._graphs: GraphSet | None = None
        if not capture or not can_capture(backbone.dtype):
            return
        device = backbone.device
        self._graphs = GraphSet(device)
        self._embeddings = torch.zeros(
            (width, backbone.hidden), dtype=backbone.dtype, device=device
        )
        self._positions = torch.zeros(width, dtype=torch.long, device=device)
        self._borders = torch.zeros(width // SHORTEST + 2, dtype=torch.int32, device=device)

    def __call__(
        self,
        embeddings: torch.Tensor,
        cu_seq_lens: torch.Tensor,
        max_length: int,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Return `(T, hidden)` states; arguments as `FusedBackbone.run_packed`."""
        tokens = len(embeddings)
        if self._graphs is None or not self._is_full(tokens, len(cu_seq_lens), max_length):
            return self.backbone.run_packed(embeddings, cu_seq_lens, max_length, positions)
        longest = -(-max_length // 128) * 128
        self._embeddings[:tokens].copy_(embeddings)
        self._positions[:tokens].copy_(positions)
        # Padding is cut into sequences no longer than the longest; the rest are empty.
        spare = torch.arange(1, len(self._borders) - len(cu_seq_lens) + 1, device=embeddings.device)
        self._borders[: len(cu_seq_lens)].copy_(cu_seq_lens)
        self._borders[len(cu_seq_lens) :].copy_((tokens + spare * longest).clamp_max(self.width))
        states = self._graphs.run(
            longest,
            lambda: self.backbone.run_packed(
                self._embeddings, self._borders, longest, self._positions
            ),
        )
        # What the graph wrote holds until it is replayed: who reads it does so on this stream.
        return states[:tokens]

    def _is_full(self, tokens: int, borders: int, max_length: int) -> bool:
        # Padding must fit the spare sequences.
        spare = len(self._borders) - borders
        padding = self.width - tokens
        return 0 <= padding < 0.1 * self.width and spare * max_length >= padding
