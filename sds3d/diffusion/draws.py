"""What an image becomes does not depend on how many are drawn with it: code that draws images by a network uses this.

Image i of seed s takes all its noise, step after step, from a stream of its own,

    torch.Generator().manual_seed(image_seed(s, i))        a normal draw of (C, h, w) in float32 for each step

so it is the same in any company, its first noise is the same for any number of steps, and image_seed(s, 0) = s: a list
of such generators makes diffusers' pipelines begin with the same noise.

A network's own answer depends on the batch, too: convolutions and matrix products choose other kernels for other sizes.
Of the packaged teachers on an EPYC with AVX2 (torch 2.13), images drawn alone and in a batch of 8 differ by 2e-6 in
float32 and by up to 0.02 in bfloat16 (on two threads). So does a longer prompt in the batch, to whose words the others
are filled up: 1e-6 and 0.02. Where an image lies in the batch, and other noise beside it, changes no bit. So networks
are given images in pieces of one size, whose prompts have as many words each; the last piece is filled up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sds3d.prompts import words
from sds3d.runtime.transfer import onto

BITS = (1 << 32) - 1  # what torch's CPU generator takes of a seed


def image_seed(seed: int, index: int) -> int:
    """The seed of image ``index``, at least 0, of ``seed``: that itself for image 0, else 32 bits that no other index
    from 1 to 2^32 - 1 has. These are MurmurHash3's finalizer, a bijection, of a line through (seed, index)."""
    if index == 0:
        return seed
    mixed = (seed * 0x9E3779B1 + index * 0x632BE5AB) & BITS
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = ((mixed ^ mixed >> shift) * factor) & BITS
    return mixed


class ImageNoise:
    """Noise of some images of a seed: every call gives fresh normal noise (B, C, h, w), each image's of its own stream.

    Args:
        seed: of all of them.
        indices: B, of the images.
        shape: (C, h, w).
        device, dtype: of what is given; the draw itself is on the CPU, in float32.
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
        """The next noise."""
        rows = torch.stack([torch.randn(self.shape, generator=stream) for stream in self.streams])
        return onto(rows.to(self.dtype), self.device)


def piece_size(side: int, device: torch.device, multiple: int = 1) -> int:
    """How many images of ``side`` pixels a network is given at a time: few enough that one alone, for which a whole
    piece is drawn, costs little, and that memory never ends; a multiple of ``multiple``."""
    pixels, most = (1 << 18, 256) if device.type == "cuda" else (1 << 15, 16)
    return -(-max(1, min(most, pixels // side**2)) // multiple) * multiple


def pieces(prompts: Sequence[str], size: int) -> Iterator[tuple[list[int], int]]:
    """Indices of the prompts in lists of ``size``, in each of which all prompts have as many words, and how many of a
    list count: the last one of so many words is filled up with its last index."""
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(len(words(prompt)), []).append(index)
    for group in groups.values():
        for first in range(0, len(group), size):
            rows = group[first : first + size]
            yield rows + rows[-1:] * (size - len(rows)), len(rows)


def in_order(rows: Sequence[int], parts: Sequence[Tensor]) -> Tensor:
    """What was made in pieces, of the images ``rows`` one after the other, as one tensor of images 0, 1, 2 ..."""
    whole = torch.cat(list(parts))
    return whole[onto(torch.tensor(rows).argsort(), whole.device)]
