"""Delta denoising score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from sds3d.diffusion.noise import noised
from sds3d.distill.core import Query, ScoreMethod, require_scale, scale_of
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import SCALES


@dataclass(frozen=True)
class DDS(ScoreMethod):
    """Delta denoising score, for edits (Hertz et al., arXiv 2304.07090): d = eps_s(x_t, y) - eps_s(x'_t, y').

    x' and y' are the source image and its prompt. Both terms use the same t and noise, so the teacher's errors that are
    common to both cancel.

    Raises:
        ValueError: the scale is below 0.
    """

    WEIGHT: ClassVar[str] = "uniform"
    NEEDS: ClassVar[tuple[str, ...]] = ("source",)

    scale: Annotated[Ramp | float, SCALES] = 7.5  # guidance s

    def __post_init__(self):
        require_scale(self, "scale")

    def __call__(self, q: Query) -> Tensor:  # (B, C, H, W), eps units
        if q.source is None:
            raise ValueError("DDS compares with a source image, and this draw has none")
        scale, (source, prompt) = q.scale(scale_of(self.scale, q.step)), q.source
        source_t = noised(source, q.noise, q.alpha, q.sigma)
        base = "negative" if q.negative else "uncond"
        return q.guided(scale) - q.guided_at(source_t, q.t, scale, base, prompt)
