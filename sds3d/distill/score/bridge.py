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
    """A bridge from the distribution of the student's images to the target's (McAllister et al., arXiv 2406.09417).

    The first stage is SDS. From step ``second`` on, d = eps_cond - eps_spoilt: the spoilt prompt is the prompt followed
    by the negative prompt, which names the artefacts that SDS leaves.

    Raises:
        ValueError: a scale, the strength or a step is below 0.
    """

    NEEDS: ClassVar[tuple[str, ...]] = ("negative",)

    scale: Annotated[Ramp | float, SCALES] = 5.0  # guidance s of the first stage
    second: Annotated[int, Within(0, STEPS)] = 200  # the step at which the second stage begins
    strength: Annotated[float, Within(0, 1e4)] = 1.0  # factor of the second stage

    def __post_init__(self):
        require_scale(self, "scale", "strength", "second")

    def __call__(self, q: Query) -> Tensor:  # (B, C, H, W), eps units
        if q.step < self.second:
            return q.guided_at(q.x_t, q.t, q.scale(scale_of(self.scale, q.step)), cached=True) - q.noise
        cond, spoilt = q.eps("cond", "spoilt")
        return self.strength * (cond - spoilt)
