"""What is exported: a scene as plain callables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sds3d.cameras import Cameras, cat, orbit

CHUNK = 1 << 17  # points in one call of a field

Density = Callable[[Tensor], Tensor]  # world points (N, 3) -> density (N,), >= 0, per scene unit
Colour = Callable[[Tensor], Tensor]  # world points (N, 3) -> sRGB (N, 3) in [0, 1]
View = Callable[[Cameras, int], tuple[Tensor, Tensor]]  # -> images (B, 3, H, H) on white, opacity (B, 1, H, H)
Tell = Callable[[str, float], None]  # what is being done, and the share of it that is done, 0 to 1


@dataclass(frozen=True)
class Source:
    """A scene in the box [-1, 1]^3 of ``cameras.py``.

    Args:
        density, colour, view: see above; all in world coordinates, without gradients.
        device: where density and colour want their points.
        detail: size of the smallest thing the scene can hold, scene units; what is smaller on its surface is noise.
        pixels: a side, of the views that judge a file; those that choose its level have two thirds.
    """

    density: Density
    colour: Colour
    view: View
    device: torch.device | str = "cpu"
    detail: float = 0.0
    pixels: int = 96


def silent(part: str, share: float) -> None:
    """A Tell that says nothing."""


def choosing_views() -> Cameras:
    """The 12 views that choose the level of the surface."""
    return cat([orbit(6, elevation=0.0, start=15.0), orbit(6, elevation=40.0, start=45.0)])


def checking_views() -> Cameras:
    """The 12 views that judge the file: none of them is one of those that chose the level."""
    return cat([orbit(6, elevation=15.0), orbit(6, elevation=50.0, start=30.0)])
