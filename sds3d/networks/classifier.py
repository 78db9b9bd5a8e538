"""Small classifiers. Their penultimate activations are the features that the evaluation compares."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """A classifier of three convolutions and two linear layers.

    Args:
        classes: number of classes.
        width: number of features.
        channels: channels of the images.
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
        """Return the features (B, width) of images x (B, channels, H, W) in [-1, 1]."""
        return self.look(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, classes) of images x."""
        return self.last(F.silu(self.features(x)))


class ToyClassifier(nn.Module):
    """A classifier of 64 x 64 images of toys: which toy, its main colour and its second colour.

    Args:
        kinds: number of toys.
        colours: number of colours.
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
        """Return the spatial means of the last feature maps, (B, 160), for x (B, 3, 64, 64) in [-1, 1]."""
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of the toy (B, kinds), of its main colour and of its second colour (B, colours each)."""
        return self.head(self.body(x).flatten(1)).split(self.sizes, -1)
