"""The embedding of a guidance scale for guidance-distilled U-Nets."""

from __future__ import annotations

import torch
from torch import Tensor


def guidance_embedding(scale: float, width: int) -> Tensor:
    """Return diffusers' embedding of a guidance scale, (width,).

    It consists of the sines and then the cosines of 1000 (scale - 1) times frequencies that fall from 1 to 1e-4, and a
    zero if the width is odd. Computed in float32, as in diffusers, since angles are as large as 7,500.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * -(torch.tensor(1e4).log() / (half - 1)))
    angles = torch.tensor(scale - 1.0) * 1000 * frequencies
    return torch.cat([angles.sin(), angles.cos(), angles.new_zeros(width % 2)])
