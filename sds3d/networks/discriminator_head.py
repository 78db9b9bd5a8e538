"""A discriminator's last layers: features of a diffusion network in, one number an image out.

It computes in the precision of its own weights, float32 at least, whatever precision the features come in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DiscriminatorHead(nn.Module):
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
        with torch.autocast(features.device.type, enabled=False):
            maps = self.look(features.to(self.last.weight.dtype))
            return self.last(maps.mean((2, 3))).sum(1)  # of one number; FSDP wants no view
