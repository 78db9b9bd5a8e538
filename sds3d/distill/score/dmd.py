"""Distribution matching distillation, with a regression on pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from sds3d.distill.core import Query, ScoreDifference, image_normaliser, scale_of
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import SCALES, Within


@dataclass(frozen=True)
class DMD(ScoreDifference):
    """Distribution matching distillation (Yin et al., arXiv 2311.18828): d = eps_s - eps_phi, normalised by image.

    N = 1 / mean |x - x0_s| over each image (eq. 8). The run adds a regression on pairs of noise and the teacher's
    sample from it (eq. 9).

    Raises:
        ValueError: the scale or the regression weight is below 0, or the floor is not above 0.
    """

    WEIGHT: ClassVar[str] = "x0"
    NEEDS: ClassVar[tuple[str, ...]] = ("critic", "pairs")

    scale: Annotated[Ramp | float, SCALES] = 1.0  # guidance s, of the teacher alone
    floor: Annotated[float, Within(0, 1e3, above=True)] = 1e-2  # lower bound of mean |x - x0_s|, which goes to 0 with t
    regression: Annotated[float, Within(0, 1e6)] = 0.25  # weight of the regression on pairs

    def __post_init__(self):
        super().__post_init__()
        if not self.floor > 0:
            raise ValueError(f"method.floor is {self.floor}; give a difference above 0 (1e-2)")
        if not self.regression >= 0:
            raise ValueError(f"method.regression is {self.regression}; give a weight of at least 0 (0.25)")

    def normaliser(self, q: Query) -> Tensor:  # (B,)
        return image_normaliser(q, scale_of(self.scale, q.step), self.floor)
