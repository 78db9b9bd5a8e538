"""The source of an export: a scene as plain callables, and the views that compare files with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sds3d.cameras import Cameras, cat, orbit

CHUNK = 1 << 17  # points in one call of a field

Density = Callable[[Tensor], Tensor]  # world points (N, 3) -> density (N,), >= 0, per scene unit
Colour = Callable[[Tensor], Tensor]  # world points (N, 3) -> sRGB (N, 3) in [0, 1]
View = Callable[[Cameras, int], tuple[Tensor, Tensor]]  # H -> images (B, 3, H, H) on white, opacity (B, 1, H, H)
Shape = Callable[[Cameras, int], "Seen"]  # H -> what a view shows, and its shape
Tell = Callable[[str, float], None]  # a progress callback: name of the current part, its finished fraction in [0, 1]


class Seen(NamedTuple):
    """Views of a scene, square, that a file is compared with.

    Args:
        rgb: (B, 3, H, H) in [0, 1], on white.
        opacity: (B, 1, H, H) in [0, 1].
        depth: (B, 1, H, H) mean distance from the camera, scene units; None if it is not known.
        normal: (B, 3, H, H) outward normals in world axes, of any length; None if they are not known.
    """

    rgb: Tensor
    opacity: Tensor
    depth: Tensor | None = None
    normal: Tensor | None = None

    def on_cpu(self) -> Seen:
        """Return the same in float32 on the CPU."""
        depth, normal = (None if image is None else image.float().cpu() for image in (self.depth, self.normal))
        return Seen(self.rgb.float().cpu(), self.opacity.float().cpu(), depth, normal)


@dataclass(frozen=True)
class Source:
    """A scene in the box [-1, 1]^3 of ``cameras.py``.

    Args:
        density, colour, view: callables of the types above, in world coordinates, without gradients.
        shape: as view, with depths and normals. Without it, files are compared by their pictures only.
        device: of the points that density and colour take.
        detail: size of the smallest feature that the scene can represent, in scene units; smaller features of a surface
            are noise.
        level: density at the surface, if the scene knows it; else the export chooses it.
        pixels: side of the views that check a file; the views that choose the surface's level have two thirds of it.
    """

    density: Density
    colour: Colour
    view: View
    shape: Shape | None = None
    device: torch.device | str = "cpu"
    detail: float = 0.0
    level: float | None = None
    pixels: int = 96


def silent(part: str, fraction: float) -> None:
    """Ignore the progress: the default Tell."""


def choosing_views() -> Cameras:
    """Return the 12 views that choose the surface's level."""
    return cat([orbit(6, elevation=0.0, start=15.0), orbit(6, elevation=40.0, start=45.0)])


def checking_views() -> Cameras:
    """Return the 12 views that check a file; they differ from those of `choosing_views`."""
    return cat([orbit(6, elevation=15.0), orbit(6, elevation=50.0, start=30.0)])
