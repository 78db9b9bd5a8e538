"""Noise and batches for drawing images, such that an image does not depend on how many are drawn with it.

Image i of seed s takes all its noise, step after step, from its own stream,

    torch.Generator().manual_seed(image_seed(s, i))        a normal draw of (C, h, w) in float32 for each step

Its first noise is the same for any number of steps. image_seed(s, 0) = s, so a list of such generators makes diffusers'
pipelines begin with the same noise.

The output of a network depends on the batch as well: convolutions and matrix products choose other kernels for other
sizes. For the packaged teachers on an EPYC with AVX2 (torch 2.13), images drawn alone and in a batch of 8 differ by
2e-6 in float32 and by up to 0.02 in bfloat16 (on two threads). Padding to a longer prompt in the batch has the same
effect: 1e-6 and 0.02. The position in the batch and the noise of other images change no bit. Networks therefore get
images in pieces of a fixed size, whose prompts have equally many words. The last piece is padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sds3d.prompts import words
from sds3d.runtime.transfer import onto

BITS = (1 << 32) - 1  # torch's CPU generator uses 32 bits of a seed


def image_seed(seed: int, index: int) -> int:
    """Return the seed of image ``index`` (at least 0) of ``seed``: ``seed`` itself for image 0, otherwise 32 bits that
    differ for all indices from 1 to 2^32 - 1.

    They are MurmurHash3's finalizer, a bijection, applied to a linear function of (seed, index).
    """
    if index == 0:
        return seed
    mixed = (seed * 0x9E3779B1 + index * 0x632BE5AB) & BITS
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = ((mixed ^ mixed >> shift) * factor) & BITS
    return mixed


class ImageNoise:
    """Draws normal noise (B, C, h, w) for images of one seed, each image's from its own stream.

    Args:
        seed: seed of all images.
        indices: indices of the B images.
        shape: (C, h, w).
        device, dtype: of the returned noise. It is drawn on the CPU in float32.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: tuple[int, ...],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.shape, self.device, self.dtype = shape, torch.device(device), dtype
        self.streams = [torch.Generator().manual_seed(image_seed(seed, index)) for index in indices]

    def __call__(self) -> Tensor:
        """Return the next noise, (B, C, h, w)."""
        rows = torch.stack([torch.randn(self.shape, generator=stream) for stream in self.streams])
        return onto(rows.to(self.dtype), self.device)


def piece_size(side: int, device: torch.device, multiple: int = 1) -> int:
    """Return how many images of ``side`` pixels a network gets at a time, a multiple of ``multiple``.

    The number is small because a single image costs a whole piece, and because the piece must fit into memory.
    """
    pixels, limit = (1 << 18, 256) if device.type == "cuda" else (1 << 15, 16)
    return -(-max(1, min(limit, pixels // side**2)) // multiple) * multiple


def pieces(prompts: Sequence[str], size: int) -> Iterator[tuple[list[int], int]]:
    """Yield pieces of the prompts: ``size`` indices of prompts with equally many words, and how many of them count.

    The last piece of each number of words is padded with its last index; the padding does not count.
    """
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(len(words(prompt)), []).append(index)
    for group in groups.values():
        for first in range(0, len(group), size):
            rows = group[first : first + size]
            yield rows + rows[-1:] * (size - len(rows)), len(rows)


def in_order(rows: Sequence[int], parts: Sequence[Tensor]) -> Tensor:
    """Concatenate pieces that hold the images ``rows``, in that order, and sort them to images 0, 1, 2 ..."""
    images = torch.cat(list(parts))
    return images[onto(torch.tensor(rows).argsort(), images.device)]
