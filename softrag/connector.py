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


class OrderedStates(nn.Module):
    """A part of a soft token: its window's states, each through a linear map of its own place.

    Starts as nothing: the last map's weights are zeros.
    """

    place_features = 64
    """Of what is kept of a state; 16 of them are a few more than a small decoder's width."""

    def __init__(self, in_features: int, places: int, out_features: int) -> None:
        """Make the maps, for windows of so many places."""
        super().__init__()
        by_place = torch.randn(places, in_features, self.place_features) * in_features**-0.5
        self.by_place = nn.Parameter(by_place)
        self.join = nn.Linear(places * self.place_features, out_features, bias=False)
        nn.init.zeros_(self.join.weight)

    @property
    def places(self) -> int:
        """Of a window."""
        return len(self.by_place)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map `(memory, places, in_features)` to `(memory, out_features)`."""
        seen = torch.bmm(states.transpose(0, 1), self.by_place.to(states.dtype))
        return self.join(seen.transpose(0, 1).flatten(1))
