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

    eps_away goes from the null prompt's answer (``negative_share`` 0) to the negative prompt's (1) and beyond.

    Raises:
        ValueError: a share below 0.
    """

    negative_share: Annotated[Ramp | float, Within(0, 1000)] = 0.0  # the paper anneals it; only with a negative prompt

    def __post_init__(self):
        require_scale(self, "negative_share")

    def unused_negative(self) -> str:
        ramp = Ramp.parse(self.negative_share)
        return "" if ramp.v0 or ramp.v1 else "give method.negative_share, as in 0.5, or leave the prompt out"

    def __call__(self, q: Query) -> Tensor:  # (B, C, H, W), eps units
        share = scale_of(self.negative_share, q.step)
        if share == 0:
            cond, uncond = q.eps("cond", "uncond")
            return cond - uncond
        cond, uncond, negative = q.eps("cond", "uncond", "negative")
        return cond - (uncond + share * (negative - uncond))
