"""Combining a teacher's answers: pure functions of eps.

One convention everywhere (Ho & Salimans, arXiv 2207.12598, with s = 1 + w):

    eps_s = eps_uncond + s (eps_cond - eps_uncond)

so s = 0 ignores the prompt, s = 1 is the conditional answer, s > 1 overshoots. Papers that write
``eps_cond + w (eps_cond - eps_uncond)`` mean s = w + 1. All functions here are linear in differences of
eps at one (x_t, t), so they may be fed x0, v, flow or score instead, and then return that.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cfg(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, (B, C, H, W) each; a negative prompt's answer may stand for ``uncond``."""
    return uncond + scale * (cond - uncond)


def perp_neg(uncond: Tensor, cond: Tensor, negatives: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Perp-Neg (Armandpour et al., arXiv 2304.04968, eq. 6 on): subtracts of each negative only what is
    perpendicular to the prompt's own direction, sample by sample.

    Args:
        uncond, cond: (B, C, H, W).
        negatives: (N, B, C, H, W), one block of B for each negative prompt.
        weights: (N, B), at least 0.
        scale: guidance s; with all weights 0 this is ``cfg``.

    Returns:
        (B, C, H, W).
    """
    assert negatives.shape[1:] == cond.shape and weights.shape == negatives.shape[:2], (negatives.shape, weights.shape)
    positive = cond - uncond
    p = positive.flatten(1)  # (B, D)
    n = (negatives - uncond).flatten(2)  # (N, B, D)
    along = (n * p).sum(-1) / p.square().sum(-1).clamp_min(torch.finfo(p.dtype).tiny)  # (N, B)
    perpendicular = n - along[..., None] * p  # (N, B, D)
    subtracted = (weights[..., None] * perpendicular).sum(0).view_as(cond)
    return uncond + scale * (positive - subtracted)
