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

    eps_phi is the critic's: the score of what the student draws, learnt along the way, under the prompt, unguided.

    Raises:
        ValueError: a scale below 0, or a number of particles outside 1 to 64.
    """

    scale: Annotated[Ramp | float, SCALES] = 7.5  # guidance s, of the teacher alone
    particles: Annotated[int, Within(1, 64)] = 1  # students that share the critic; one of them draws in each step

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.particles <= 64:
            raise ValueError(f"method.particles is {self.particles}; give 1 to 64")
