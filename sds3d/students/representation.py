"""The protocol of scenes, for every representation (a density, splats, a mesh), and the result of rendering one.

Shading (DreamFusion, arXiv 2209.14988, section 3.1): "albedo" is the colour itself; "lambertian" multiplies it by
ambient + (1 - ambient) max(0, n . l); "textureless" shades white instead of the colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from sds3d import domains
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


def domain_image(views: Views, cameras: Cameras, domain: str) -> Tensor:
    """Return what a domain shows of a scene: images (B, 3, H, W) in [0, 1].

    Args:
        views: square images from the cameras; the domain "normals" needs their normals.
        cameras: B cameras, on the views' device.
        domain: a key of `sds3d.domains.WORDS`.
    """
    if domain == "normals":
        assert views.normal is not None, "the normals were not rendered"
        return domains.picture(domains.turned(views.normal, cameras.rotations()))
    if domain == "depths":
        origins, directions = (rays.permute(0, 3, 1, 2) for rays in cameras.rays(views.depth.shape[-1]))
        points = views.opacity * (origins + directions * views.depth)
        return domains.picture(domains.heights(points, cameras.positions()))
    return views.rgb


@runtime_checkable
class Scene(Student, Protocol):
    """A student that renders views from cameras and has a surface.

    A representation is a folder beside ``scene/`` with a class that has these members. Previews, films, layers, edits
    and export use only these members.

    Attributes:
        OPTIM: the default learning rate of each parameter group.
        device: where parameters and images live.
        background_name: name of the last draw's background.
        backgrounds: name -> RGB (3,) in [0, 1] of the known plain backgrounds.
    """

    OPTIM: ClassVar[OptimConfig]
    device: torch.device
    background_name: str
    backgrounds: dict[str, Tensor]

    @property
    def kernels(self) -> str:
        """Name of the kernels that render, such as "numba"."""
        ...

    @property
    def detail(self) -> float:
        """Size of the smallest feature that the scene can represent, in scene units."""
        ...

    @property
    def surface_density(self) -> float | None:
        """The density at the surface if the representation has a surface, as a signed distance; else None."""
        ...

    def learn_backgrounds(self, backgrounds: Mapping[str, Tensor], /) -> None:
        """Add plain backgrounds, name -> RGB (3,) in [0, 1], to those that the scene knows."""
        ...

    def render_view(
        self,
        cameras: Cameras | Poses,
        resolution: int | None = None,
        shading: Shading = ALBEDO,
        normals: bool = False,
        background: str | None = None,
    ) -> Views:
        """Render views deterministically, without gradients.

        Args:
            cameras: B views.
            resolution: height in pixels; None is that of the last training steps.
            shading: the shading of the colours.
            normals: whether to render normals.
            background: a known name or "#rrggbb"; None is the run's default.
        """
        ...

    def density(self, points: Tensor) -> Tensor:
        """Return densities (N,), >= 0, per scene unit, at points (N, 3); 0 in empty space."""
        ...

    def colours(self, points: Tensor) -> Tensor:
        """Return colours (N, 3) in [0, 1] at points (N, 3); unlit colours if the scene models its light."""
        ...
