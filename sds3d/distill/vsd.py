"""Variational score distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sds3d.distill.core import Method, Query, require_scale, scale_of
from sds3d.ramp import Ramp


@dataclass(frozen=True)
class VSD(Method):
    """Variational score distillation (Wang et al., ProlificDreamer, arXiv 2305.16213): d = eps_s - eps_phi.

    eps_phi is the critic's: the score of what the student draws, learnt along the way, under the prompt, unguided.

    Raises:
        ValueError: a scale below 0, or a number of particles outside 1 to 64.
    """

    NEEDS: ClassVar[tuple[str, ...]] = ("critic",)

    scale: Ramp | float = 7.5  # guidance s, of the teacher alone
    particles: int = 1  # students that share the critic; one of them draws in each step

    def __post_init__(self):
        require_scale(self, "scale")
        if not 1 <= self.particles <= 64:
            raise ValueError(f"method.particles is {self.particles}; give 1 to 64")

    def __call__(self, q: Query) -> Tensor:  # (B, C, H, W), eps units
        return q.guided(scale_of(self.scale, q.step)) - q.critic_eps()
