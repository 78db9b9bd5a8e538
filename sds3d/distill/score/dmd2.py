"""Distribution matching distillation, with a discriminator instead of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from sds3d.distill.core import Query, ScoreDifference, image_normaliser, scale_of
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import SCALES, Within


@dataclass(frozen=True)
class DMD2(ScoreDifference):
    """Improved distribution matching distillation (Yin et al., DMD2, arXiv 2405.14867): DMD without pairs.

    The regression is replaced by several critic steps for each step (critic.steps), and by a discriminator between
    noised drawn and noised real images on the critic's features (section 4).

    Raises:
        ValueError: the scale or a weight is below 0, or the floor is not above 0.
    """

    WEIGHT: ClassVar[str] = "x0"
    NEEDS: ClassVar[tuple[str, ...]] = ("critic", "real")

    scale: Annotated[Ramp | float, SCALES] = 1.0  # guidance s, of the teacher alone
    floor: Annotated[float, Within(0, 1e3, above=True)] = 1e-2  # lower bound of mean |x - x0_s|
    adversarial: Annotated[float, Within(0, 1e6)] = 3e-3  # weight of the adversarial loss in the generator's loss
    discriminator: Annotated[float, Within(0, 1e6)] = 1e-2  # weight of the discriminator's loss in the critic's loss

    def __post_init__(self):
        super().__post_init__()
        if not self.floor > 0:
            raise ValueError(f"method.floor is {self.floor}; give a difference above 0 (1e-2)")
        for name in ("adversarial", "discriminator"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"method.{name} is {getattr(self, name)}; give a weight of at least 0")

    def normaliser(self, q: Query) -> Tensor:  # (B,)
        return image_normaliser(q, scale_of(self.scale, q.step), self.floor)
