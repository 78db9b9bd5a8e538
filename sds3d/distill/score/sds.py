"""Score distillation sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from sds3d.distill.core import Query, ScoreMethod, require_scale, scale_of
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import SCALES


@dataclass(frozen=True)
class SDS(ScoreMethod):
    """Score distillation sampling (Poole et al., DreamFusion, arXiv 2209.14988, eq. 3): d = eps_s(x_t) - eps.

    If the run has a negative prompt, it replaces the null prompt in the guidance.

    Raises:
        ValueError: the scale is below 0.
    """

    # guidance s, which may change with the step; DreamFusion used 100 with its own teacher
    scale: Annotated[Ramp | float, SCALES] = 5.0

    def __post_init__(self):
        require_scale(self, "scale")

    def __call__(self, q: Query) -> Tensor:  # (B, C, H, W), eps units
        return q.guided(scale_of(self.scale, q.step)) - q.noise
