"""A score network for points: x_t and t in, v out."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PointNet(nn.Module):
    """Two hidden layers over points of a few dimensions and waves of t; zero everywhere at first.

    Args:
        dimensions: of a point.
        width: of the hidden layers.
    """

    def __init__(self, dimensions: int, width: int = 128):
        super().__init__()
        first, second, last = nn.Linear(dimensions + 8, width), nn.Linear(width, width), nn.Linear(width, dimensions)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, D, ...) and (B,) in [0, 1] -> v, shape of x_t."""
        angles = t[:, None] * math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=x_t.dtype, device=x_t.device)
        out = self.layers(torch.cat([x_t.flatten(1), angles.sin(), angles.cos()], 1))
        return out.view(x_t.shape)
