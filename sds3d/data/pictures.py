"""Captioned pictures in memory, for training teachers on data other than the toybox."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sds3d.prompts import words


@dataclass(frozen=True)
class Pictures:
    """Images with captions.

    Args:
        images: (N, C, S, S) uint8, where C is 1 or 3.
        captions: one or more captions for each image.
    """

    images: Tensor
    captions: list[tuple[str, ...]]

    def __post_init__(self):
        assert self.images.dtype == torch.uint8 and self.images.dim() == 4, (self.images.dtype, self.images.shape)
        assert len(self.images) == len(self.captions) and all(self.captions), len(self.captions)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Iterable[int]) -> Pictures:
        """Select pictures by their indices."""
        index = list(index)
        return Pictures(self.images[index], [self.captions[i] for i in index])

    @property
    def size(self) -> int:
        """Width and height of the images in pixels."""
        return self.images.shape[-1]

    @property
    def channels(self) -> int:
        """Number of channels, 1 or 3."""
        return self.images.shape[1]

    def vocabulary(self) -> tuple[str, ...]:
        """Return all words of the captions, sorted."""
        return tuple(sorted({word for texts in self.captions for text in texts for word in words(text)}))

    def rgb(self) -> Tensor:
        """Return the images as (N, 3, S, S) in [0, 1]."""
        return (self.images.float() / 255).expand(-1, 3, -1, -1)
