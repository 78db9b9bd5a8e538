"""Classifier score distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from sds3d.distill.core import Query, ScoreMethod, require_scale, scale_of
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import Within


@dataclass(frozen=True)
class CSD(ScoreMethod):
    """Classifier score distillation (Yu et al., arXiv 2310.19415): d = eps_cond - eps_away.

    eps_away = eps_uncond + negative_share (eps_negative - eps_uncond): the null prompt's prediction at
    ``negative_share`` 0, the negative prompt's at 1, an extrapolation above.

    Raises:
        ValueError: negative_share is below 0.
    """

    negative_share: Annotated[Ramp | float, Within(0, 1000)] = 0.0  # annealed in the paper; needs a negative prompt

    def __post_init__(self):
        require_scale(self, "negative_share")

    def unused_negative(self) -> str:
        ramp = Ramp.parse(self.negative_share)
        return "" if ramp.v0 or ramp.v1 else "give method.negative_share, as in 0.5, or leave the prompt out"

    def __call__(self, q: Query) -> Tensor:  # (B, C, H, W), eps units
        fraction = scale_of(self.negative_share, q.step)
        if fraction == 0:
            cond, uncond = q.eps("cond", "uncond")
            return cond - uncond
        cond, uncond, negative = q.eps("cond", "uncond", "negative")
        return cond - (uncond + fraction * (negative - uncond))
