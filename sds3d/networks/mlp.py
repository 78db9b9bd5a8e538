"""A small denoising network for points: it predicts v from x_t and t."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PointNet(nn.Module):
    """Two hidden layers over a point and sinusoidal features of t. The output is zero at initialisation.

    Args:
        dimensions: dimensions of a point.
        width: width of the hidden layers.
    """

    def __init__(self, dimensions: int, width: int = 128):
        super().__init__()
        first, second, last = nn.Linear(dimensions + 8, width), nn.Linear(width, width), nn.Linear(width, dimensions)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return v, shape of x_t, for x_t (B, D, ...) and t (B,) in [0, 1]."""
        angles = t[:, None] * math.pi * torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=x_t.dtype, device=x_t.device)
        out = self.layers(torch.cat([x_t.flatten(1), angles.sin(), angles.cos()], 1))
        return out.view(x_t.shape)
