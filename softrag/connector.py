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


class StandardizedConnector(nn.Module):
    """Standardised states through one linear layer, and two more with GELU between beside it.

    The mean of a compressor's states is many times their spread: what all documents have in common
    soon switches every ReLU of a `Connector` off, for all of them. Here it is taken away first.

    Attributes:
        mean: `(in_features,)` of the states, as `calibrate` found it; never trained.
        std: `(in_features,)` their spread, likewise.
        gain: `(1,)` size of the output, that of the decoder's embeddings; never trained.
    """

    def __init__(self, in_features: int, hidden: int, out_features: int) -> None:
        """Start with a small linear map of the states alone."""
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(in_features), requires_grad=False)
        self.std = nn.Parameter(torch.ones(in_features), requires_grad=False)
        self.gain = nn.Parameter(torch.ones(1), requires_grad=False)
        self.direct = nn.Linear(in_features, out_features, bias=False)
        self.up = nn.Linear(in_features, hidden)
        self.down = nn.Linear(hidden, out_features)
        nn.init.normal_(self.direct.weight, std=0.1 / in_features**0.5)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map `(memory, in_features)` to `(memory, out_features)`."""
        x = (states.float() - self.mean.float()) / self.std.float()
        # A state unlike all that were measured must not drown the others.
        x = x.clamp(-8, 8).to(states.dtype)
        y = self.direct(x) + self.down(nn.functional.gelu(self.up(x)))
        return y * self.gain.to(y.dtype)

    @torch.no_grad()
    def calibrate(self, states: torch.Tensor) -> None:
        """Take mean and spread from `(n, in_features)` states.

        Raises:
            ValueError: They are fewer than two.
        """
        if len(states) < 2:
            raise ValueError(
                f"A connector is calibrated on 2 states or more, and there are {len(states)}; give "
                "more or longer documents."
            )
        self.mean.copy_(states.float().mean(0))
        self.std.copy_(states.float().std(0).clamp_min(1e-3))
