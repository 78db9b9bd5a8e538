"""Score distillation via inversion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from sds3d.diffusion.noise import per_sample
from sds3d.distill.core import Query, ScoreMethod, require_scale, scale_of
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import SCALES, Within


@dataclass(frozen=True)
class SDI(ScoreMethod):
    """Score distillation via inversion (Lukoianov et al., arXiv 2405.15891): d = eps_s(x_t) - kappa(x).

    kappa is the noise that DDIM inversion finds for the image: x_t = alpha x + sigma kappa. With the weight "x0" the
    gradient is x - x0, the residual to the teacher's denoised image.

    Raises:
        ValueError: the scale is below 0, steps is below 1, or eta is outside [0, 1].
    """

    WEIGHT: ClassVar[str] = "x0"

    scale: Annotated[Ramp | float, SCALES] = 7.5  # guidance s of eps_s
    inversion_scale: Annotated[float, SCALES] = -7.5  # guidance s of the inversion
    steps: Annotated[int, Within(1, 1000)] = 10  # steps of the inversion
    eta: Annotated[float, Within(0, 1)] = 0.3  # amount of fresh noise in the inversion, see samplers.ddim

    def __post_init__(self):
        require_scale(self, "scale")
        if self.steps < 1 or not 0 <= self.eta <= 1:
            raise ValueError(f"SDI needs at least 1 step and eta in [0, 1], got {self.steps} and {self.eta}")

    def __call__(self, q: Query) -> Tensor:  # (B, C, H, W), eps units
        x_t = q.inverted(q.t, self.steps, self.inversion_scale, self.eta)
        kappa = (x_t - per_sample(q.alpha, q.x) * q.x) / per_sample(q.sigma, q.x)
        return q.at(x_t).guided(scale_of(self.scale, q.step)) - kappa
