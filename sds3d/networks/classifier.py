"""Small classifiers: what they see before their answer are the features that judges compare."""

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


class ToyClassifier(nn.Module):
    """Five convolutions for 64 x 64 pixels: which toy, its main colour, its second colour.

    Args:
        kinds, colours: how many.
    """

    def __init__(self, kinds: int, colours: int):
        super().__init__()
        self.sizes = [kinds, colours, colours]
        widths, layers = (3, 24, 48, 96, 160), []
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Conv2d(160, 160, 3, padding=1), nn.SiLU())
        self.head = nn.Linear(160 * 16, sum(self.sizes))

    def features(self, x: Tensor) -> Tensor:
        """x (B, 3, 64, 64) in [-1, 1] -> (B, 160), the last maps' means."""
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x -> logits of the toy (B, kinds), of its main and of its second colour (B, colours)."""
        return self.head(self.body(x).flatten(1)).split(self.sizes, -1)
