"""Guidance: pure functions that combine a teacher's predictions.

The guidance scale s is defined by (Ho & Salimans, arXiv 2207.12598, with s = 1 + w)

    eps_s = eps_uncond + s (eps_cond - eps_uncond)

so s = 0 ignores the prompt, s = 1 is the conditional prediction, and s > 1 extrapolates. Papers that write
``eps_cond + w (eps_cond - eps_uncond)`` mean s = w + 1. All functions are linear in differences of eps at one
(x_t, t), so they accept x0, v, flow or score instead of eps, and then return the same quantity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from sds3d.diffusion.noise import per_sample
from sds3d.runtime.ranges import Within

RESCALED = ("x0", "output")


@dataclass(frozen=True)
class Guidance:
    """Settings of guidance beside the method's scale.

    Args:
        perp_neg: weight of Perp-Neg on the view words that do not fit the camera; 0 turns it off. For teachers that
            get the view in words.
        rescale: fraction of CFG rescale, 0 to 1.
        rescale_on: what the rescale acts on: "x0", or "output", the quantity the network predicts (eps, v or flow), as
            diffusers' guidance_rescale does.

    Raises:
        ValueError: a value is out of range.
    """

    perp_neg: Annotated[float, Within(0, 1000)] = 0.0
    rescale: Annotated[float, Within(0, 1)] = 0.0
    rescale_on: str = "x0"

    def __post_init__(self):
        if self.perp_neg < 0:
            raise ValueError(f"guidance.perp_neg is {self.perp_neg}; give a weight of at least 0")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance.rescale is {self.rescale}; give a fraction from 0 to 1")
        if self.rescale_on not in RESCALED:
            raise ValueError(f"guidance.rescale_on is {self.rescale_on!r}; give {' or '.join(RESCALED)}")
        if self.rescale_on != "x0" and not self.rescale:
            raise ValueError(
                f"guidance.rescale_on={self.rescale_on} needs a fraction: give guidance.rescale, as in 0.7"
            )


def cfg(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """Return the classifier-free guidance of predictions (B, C, H, W). ``uncond`` may be a negative prompt's."""
    return uncond + scale * (cond - uncond)


def cfg_rescale(guided: Tensor, cond: Tensor, fraction: float) -> Tensor:
    """Apply CFG rescale (Lin et al., arXiv 2305.08891, eq. 15 and 16) to predictions of x0, eps or v, (B, C, H, W).

    Scales each sample of ``guided`` to the standard deviation of ``cond``, and interpolates: ``fraction`` of the
    result is rescaled, the rest is ``guided``.
    """
    assert guided.shape == cond.shape, (guided.shape, cond.shape)
    std_cond, std_guided = (per_sample(x.flatten(1).std(1), guided) for x in (cond, guided))
    return guided * (1 - fraction + fraction * std_cond / std_guided.clamp_min(1e-12))


def perp_neg(uncond: Tensor, cond: Tensor, negatives: Tensor, weights: Tensor, scale: float) -> Tensor:
    """Apply Perp-Neg (Armandpour et al., arXiv 2304.04968, eq. 6 on).

    For each sample, subtracts from the guidance only the component of each negative that is perpendicular to the
    prompt's direction.

    Args:
        uncond, cond: (B, C, H, W).
        negatives: (N, B, C, H, W), B predictions for each negative prompt.
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
