"""What every scene can do, whatever represents it (a density, splats, a mesh), and what its views are.

Shading (DreamFusion, arXiv 2209.14988, section 3.1): "albedo" is the colour itself; "lambertian" multiplies it by
ambient + (1 - ambient) max(0, n . l); "textureless" shades white instead of the colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from sds3d.cameras import Cameras, Poses
from sds3d.students.base import Student
from sds3d.students.optim import OptimConfig

SHADINGS = ("albedo", "lambertian", "textureless")


@dataclass(frozen=True)
class Shading:
    """The shading of the colours.

    Args:
        kind: one of SHADINGS.
        light: (3,) or (B, 3) directions towards the light, of any length; None places the light at the camera.
        ambient: fraction of ambient light, 0 to 1.
    """

    kind: str = "albedo"
    light: Tensor | None = None
    ambient: float = 0.3

    def __post_init__(self):
        if self.kind not in SHADINGS:
            raise ValueError(f"render.shading is {self.kind!r}; give one of {', '.join(SHADINGS)}")


ALBEDO = Shading()


@dataclass
class Views:
    """Images of B views.

    Args:
        rgb: (B, 3, H, W) in [0, 1].
        opacity: (B, 1, H, W) in [0, 1].
        depth: (B, 1, H, W) expected distance from the camera, scene units; 0 where a ray hits nothing.
        normal: (B, 3, H, W) weighted outward normals in world axes, length <= 1; None if they were not rendered.
    """

    rgb: Tensor
    opacity: Tensor
    depth: Tensor
    normal: Tensor | None


@runtime_checkable
class Scene(Student, Protocol):
    """A student that is seen from cameras and has a surface.

    A representation is a folder beside ``scene/`` with a class that has these members. Previews, films, layers, edits
    and export use nothing else.

    Attributes:
        OPTIM: the usual learning rate of each of its parameter groups.
        device: where its parameters and images live.
        background_name: of the last draw's background.
        backgrounds: name -> RGB (3,) in [0, 1] of the plain backgrounds that it knows by name.
    """

    OPTIM: ClassVar[OptimConfig]
    device: torch.device
    background_name: str
    backgrounds: dict[str, Tensor]

    @property
    def kernels(self) -> str:
        """What it renders with, as "numba"."""
        ...

    @property
    def detail(self) -> float:
        """Size of the smallest thing that it can hold, scene units."""
        ...

    def learn_backgrounds(self, backgrounds: Mapping[str, Tensor], /) -> None:
        """Know more plain backgrounds: name -> RGB (3,) in [0, 1]."""
        ...

    def render_view(
        self,
        cameras: Cameras | Poses,
        resolution: int | None = None,
        shading: Shading = ALBEDO,
        normals: bool = False,
        background: str | None = None,
    ) -> Views:
        """Views without gradients, the same each time: images (B, 3, H, W) in [0, 1], opacity, depth, normals.

        Args:
            resolution: pixels of the height; None is that of the last training steps.
            shading: how colour is lit.
            normals: whether normals are rendered.
            background: a known name or "#rrggbb"; None is the run's usual one.
        """
        ...

    def density(self, points: Tensor) -> Tensor:
        """Densities (N,) >= 0, per scene unit, at points (N, 3); 0 where nothing is."""
        ...

    def colours(self, points: Tensor) -> Tensor:
        """Colours (N, 3) in [0, 1] at points (N, 3), without light where it knows its light."""
        ...
