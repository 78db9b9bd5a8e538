"""Diff-Instruct."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from sds3d.distill.core import ScoreDifference
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import SCALES


@dataclass(frozen=True)
class DiffInstruct(ScoreDifference):
    """Diff-Instruct (Luo et al., arXiv 2305.18455): d = eps_s - eps_phi, weighted as a difference of denoised images.

    This is the gradient of the KL divergence between the noised distributions of the generator and of the data,
    integrated over t.

    Raises:
        ValueError: the scale is below 0.
    """

    WEIGHT: ClassVar[str] = "x0"

    scale: Annotated[Ramp | float, SCALES] = 1.0  # guidance s, of the teacher alone
