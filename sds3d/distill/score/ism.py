"""Interval score matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from sds3d.diffusion.noise import noised
from sds3d.distill.core import Query, ScoreMethod, require_scale, scale_of
from sds3d.distill.query import T_CLEAN
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import SCALES, Within


@dataclass(frozen=True)
class ISM(ScoreMethod):
    """Interval score matching (Liang et al., LucidDreamer, arXiv 2311.11284): d = eps_s(x_t) - eps_uncond(x_s).

    x_s with s = t - gap comes from the image by DDIM inversion under the null prompt; x_t comes from x_s by one more
    step of the inversion.

    Raises:
        ValueError: the scale is below 0, steps is below 1, or the gap is outside (0, 1).
    """

    WEIGHT: ClassVar[str] = "x0"

    scale: Annotated[Ramp | float, SCALES] = 7.5  # guidance s
    gap: Annotated[float, Within(0, 1, above=True)] = 0.05  # t - s
    steps: Annotated[int, Within(1, 1000)] = 5  # steps of the inversion from the image to s

    def __post_init__(self):
        require_scale(self, "scale")
        if self.steps < 1 or not 0 < self.gap < 1:
            raise ValueError(f"ISM needs at least 1 step and a gap in (0, 1), got {self.steps} and {self.gap}")

    def __call__(self, q: Query) -> Tensor:  # (B, C, H, W), eps units
        s = (q.t - self.gap).clamp_min(T_CLEAN)
        x_s = q.inverted(s, self.steps, scale=0.0)
        (uncond,) = q.predict(x_s, s, "uncond")
        x_t = noised(uncond.x0, uncond.eps, q.alpha, q.sigma)
        return q.at(x_t).guided(scale_of(self.scale, q.step)) - uncond.eps
