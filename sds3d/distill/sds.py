"""Score distillation sampling."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sds3d.distill.core import Query
from sds3d.guidance import cfg
from sds3d.ramp import Ramp


@dataclass(frozen=True)
class SDS:
    """Score distillation sampling (Poole et al., DreamFusion, arXiv 2209.14988, eq. 3): d = eps_s(x_t) - eps.

    A negative prompt, where the run has one, takes the null prompt's place in the guidance.

    Raises:
        ValueError: a scale below 0.
    """

    scale: Ramp | float = 5.0  # guidance s, may change with the step; DreamFusion used 100 with its own teacher

    def __post_init__(self):
        scale = Ramp.parse(self.scale)
        if min(scale.v0, scale.v1) < 0:
            raise ValueError(f"SDS's guidance scale must be at least 0, got {self.scale}")

    def __call__(self, q: Query) -> Tensor:  # (B, C, H, W), eps units
        scale = Ramp.parse(self.scale)(q.step)
        if scale == 1:  # only the prompt counts: save the other half of the forward
            (cond,) = q.eps("cond")
            return cond - q.noise
        cond, away = q.eps("cond", "negative" if q.negative else "uncond")
        return cfg(away, cond, scale) - q.noise
