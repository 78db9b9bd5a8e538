"""A small classifier of small images: what it sees before its answer are the features that judges compare."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """Three convolutions and two layers.

    Args:
        classes: how many.
        width: of the features.
        channels: of the images.
    """

    def __init__(self, classes: int, width: int = 48, channels: int = 1):
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 16, width),
        )
        self.last = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        """x (B, channels, H, W) in [-1, 1] -> (B, width)."""
        return self.look(x)

    def forward(self, x: Tensor) -> Tensor:
        """x -> logits (B, classes)."""
        return self.last(F.silu(self.features(x)))
