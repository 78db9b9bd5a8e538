"""A discriminator's last layers: features of a diffusion network in, one number an image out."""

from __future__ import annotations

from torch import Tensor, nn


class Verdict(nn.Module):
    """How real the images behind feature maps are.

    Args:
        width: channels of the maps, a multiple of 8.
    """

    def __init__(self, width: int):
        super().__init__()
        self.look = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 1), nn.SiLU())
        self.last = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, width, h, w) -> (B,), above 0 for real."""
        return self.last(self.look(features).mean((2, 3))).sum(1)  # of one number; FSDP wants no view
