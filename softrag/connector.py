"""What maps the compressor's states into the decoder's embedding space: soft tokens."""

from __future__ import annotations

import torch
from torch import nn


class Connector(nn.Module):
    """Two linear layers with ReLU between (OSCAR, table 7): compressor states to soft tokens."""

    def __init__(self, in_features: int, hidden: int, out_features: int) -> None:
        """Make the layers; `match_scale` sets the output's size."""
        super().__init__()
        self.up = nn.Linear(in_features, hidden)
        self.down = nn.Linear(hidden, out_features)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map `(memory, in_features)` to `(memory, out_features)`."""
        return self.down(nn.functional.relu(self.up(states)))

    @torch.no_grad()
    def match_scale(self, states: torch.Tensor, rms: float) -> None:
        """Scale the output for these input states to a root mean square.

        Soft tokens that are several times larger or smaller than token embeddings make the first
        steps of training a fight against the decoder.
        """
        factor = rms / self(states).float().pow(2).mean().sqrt().clamp_min(1e-12)
        self.down.weight.mul_(factor)
        self.down.bias.mul_(factor)
