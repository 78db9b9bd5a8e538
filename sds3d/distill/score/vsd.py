"""Variational score distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sds3d.distill.core import ScoreDifference
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import SCALES, Within


@dataclass(frozen=True)
class VSD(ScoreDifference):
    """Variational score distillation (Wang et al., ProlificDreamer, arXiv 2305.16213): d = eps_s - eps_phi.

    eps_phi is the unguided prediction of the critic, which learns the score of the student's images during the run.

    Raises:
        ValueError: the scale is below 0, or the number of particles is not 1 to 64.
    """

    scale: Annotated[Ramp | float, SCALES] = 7.5  # guidance s, of the teacher alone
    particles: Annotated[int, Within(1, 64)] = 1  # students that share one critic; each step trains one of them

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.particles <= 64:
            raise ValueError(f"method.particles is {self.particles}; give 1 to 64")
