"""Noise-free score distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from sds3d.diffusion.noise import per_sample
from sds3d.distill.core import Query, ScoreMethod, require_scale, scale_of
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import SCALES, Within


@dataclass(frozen=True)
class NFSD(ScoreMethod):
    """Noise-free score distillation (Katzir et al., arXiv 2310.17590).

    d = delta_D + s delta_C with delta_C = eps_cond - eps_uncond. delta_D = eps_uncond at low noise, where it points
    towards clean images, and eps_uncond - eps_negative at high noise. The negative prompt names defects ("blurry, low
    quality ..."); it never replaces the null prompt.

    Raises:
        ValueError: the scale or the switch is below 0.
    """

    NEEDS: ClassVar[tuple[str, ...]] = ("negative",)

    scale: Annotated[Ramp | float, SCALES] = 7.5  # guidance s
    # sigma/alpha below which eps_negative is not subtracted (Stable Diffusion's index 200 of 1,000)
    switch: Annotated[float, Within(0, 1e4)] = 0.572

    def __post_init__(self):
        require_scale(self, "scale", "switch")

    def __call__(self, q: Query) -> Tensor:  # (B, C, H, W), eps units
        cond, uncond, negative = q.eps("cond", "uncond", "negative")
        low = per_sample(q.sigma < self.switch * q.alpha, q.x)
        return uncond - torch.where(low, 0.0, negative) + q.scale(scale_of(self.scale, q.step)) * (cond - uncond)
