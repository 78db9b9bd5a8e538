"""The last layers of a discriminator: they map features of a diffusion network to one logit per image.

They compute in the dtype of their own weights (at least float32), whatever the dtype of the features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DiscriminatorHead(nn.Module):
    """Maps features of an image to a logit that is positive for real images.

    Args:
        width: channels of the feature maps, a multiple of 8.
    """

    def __init__(self, width: int):
        super().__init__()
        self.look = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 1), nn.SiLU())
        self.last = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B,), positive for real, of feature maps (B, width, h, w)."""
        with torch.autocast(features.device.type, enabled=False):
            maps = self.look(features.to(self.last.weight.dtype))
            return self.last(maps.mean((2, 3))).sum(1)  # removes the axis of size 1; FSDP allows no view here
