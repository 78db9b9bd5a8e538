"""Score distillation as a bridge between two image distributions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from sds3d.distill.core import Query, ScoreMethod, require_scale, scale_of
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import SCALES, STEPS, Within


@dataclass(frozen=True)
class Bridge(ScoreMethod):
    """A bridge from the images there are to those there should be (McAllister et al., arXiv 2406.09417).

    First SDS, which makes the shape and leaves its artefacts; from step ``second`` on d = eps_cond - eps_spoilt, where
    the spoilt prompt is the prompt and the negative prompt's words for those artefacts.

    Raises:
        ValueError: a scale below 0 or a step below 0.
    """

    NEEDS: ClassVar[tuple[str, ...]] = ("negative",)

    scale: Annotated[Ramp | float, SCALES] = 5.0  # guidance s of the first stage
    second: Annotated[int, Within(0, STEPS)] = 200  # the step at which the second stage begins
    strength: Annotated[float, Within(0, 1e4)] = 1.0  # factor of the second stage

    def __post_init__(self):
        require_scale(self, "scale", "strength", "second")

    def __call__(self, q: Query) -> Tensor:  # (B, C, H, W), eps units
        if q.step < self.second:
            return q.guided_at(q.x_t, q.t, scale_of(self.scale, q.step), cached=True) - q.noise
        cond, spoilt = q.eps("cond", "spoilt")
        return self.strength * (cond - spoilt)
