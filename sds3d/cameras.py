"""Cameras, rays, and the conventions for axes, units and angles.

World
    Right-handed, y up, in scene units. The scene lives in the box [-1, 1]^3. The front of an object
    faces +z (glTF's convention), so a prompt's front is the exported asset's front.
Angles
    Degrees everywhere. Azimuth 0 looks at the front (the camera stands on +z); it grows
    counter-clockwise seen from above, so at azimuth 90 the camera stands on +x. Elevation 0 is level,
    90 straight above.
Camera
    OpenGL axes: x right, y up, looking along -z at the origin. ``fov`` is the vertical field of view.
Images
    (B, 3, H, W), RGB in [0, 1], row 0 at the top; rays go through pixel centres.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from sds3d.runtime.ranges import Within
from sds3d.runtime.transfer import onto


@dataclass(frozen=True)
class Cameras:
    """A batch of cameras that look at the origin.

    Args:
        azimuth: (B,) degrees, 0 = front, 90 = camera on +x.
        elevation: (B,) degrees in [-90, 90].
        distance: (B,) from the origin, scene units.
        fov: (B,) vertical field of view, degrees.
    """

    azimuth: Tensor
    elevation: Tensor
    distance: Tensor
    fov: Tensor

    def __len__(self) -> int:
        return self.azimuth.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> Cameras:
        """Select cameras by slice, index tensor or mask; an int keeps the batch axis."""
        if isinstance(index, int):
            index = slice(index, index + 1) if index != -1 else slice(-1, None)
        return Cameras(self.azimuth[index], self.elevation[index], self.distance[index], self.fov[index])

    def to(self, device: torch.device | str) -> Cameras:
        """Return the same cameras on a device."""
        azimuth, elevation = onto(self.azimuth, device), onto(self.elevation, device)
        return Cameras(azimuth, elevation, onto(self.distance, device), onto(self.fov, device))

    def positions(self) -> Tensor:
        """Return the positions in world coordinates, (B, 3)."""
        azimuth, elevation = torch.deg2rad(self.azimuth), torch.deg2rad(self.elevation)
        flat = torch.cos(elevation)
        direction = torch.stack([flat * torch.sin(azimuth), torch.sin(elevation), flat * torch.cos(azimuth)], -1)
        return self.distance[:, None] * direction

    def rotations(self) -> Tensor:
        """Return camera-to-world rotations, (B, 3, 3); columns are right, up, backward."""
        azimuth, elevation = torch.deg2rad(self.azimuth), torch.deg2rad(self.elevation)
        sa, ca, se, ce = torch.sin(azimuth), torch.cos(azimuth), torch.sin(elevation), torch.cos(elevation)
        zero = torch.zeros_like(sa)
        right = torch.stack([ca, zero, -sa], -1)  # also defined straight above and below
        up = torch.stack([-se * sa, ce, -se * ca], -1)
        back = torch.stack([ce * sa, se, ce * ca], -1)
        return torch.stack([right, up, back], -1)

    def rays(self, height: int, width: int | None = None) -> tuple[Tensor, Tensor]:
        """Return rays through the pixel centres: origins and unit directions, both (B, height, width, 3)."""
        return _rays(self.positions(), self.rotations(), self.fov, height, width or height)


@dataclass(frozen=True)
class Poses:
    """A batch of cameras with arbitrary positions and directions, as in a viewer. They can replace `Cameras`.

    Args:
        position: (B, 3) in world coordinates.
        rotation: (B, 3, 3) camera-to-world; columns are right, up, backward.
        fov: (B,) vertical field of view, degrees.
        aspect: width of the images over their height.
    """

    position: Tensor
    rotation: Tensor
    fov: Tensor
    aspect: float = 1.0

    def __len__(self) -> int:
        return self.position.shape[0]

    def to(self, device: torch.device | str) -> Poses:
        """Return the same poses on a device."""
        return Poses(onto(self.position, device), onto(self.rotation, device), onto(self.fov, device), self.aspect)

    def positions(self) -> Tensor:
        """Return the positions in world coordinates, (B, 3)."""
        return self.position

    def rays(self, height: int) -> tuple[Tensor, Tensor]:
        """Return rays through the pixel centres: origins and unit directions, both (B, height, width, 3)."""
        return _rays(self.position, self.rotation, self.fov, height, max(1, round(height * self.aspect)))


def _rays(positions: Tensor, rotations: Tensor, fov: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Origins and unit directions (B, height, width, 3) from positions (B, 3), rotations (B, 3, 3) and fov (B,)."""
    device, dtype = fov.device, fov.dtype
    rows = (torch.arange(height, device=device, dtype=dtype) + 0.5) / height * 2 - 1
    cols = ((torch.arange(width, device=device, dtype=dtype) + 0.5) / width * 2 - 1) * (width / height)
    y, x = torch.meshgrid(-rows, cols, indexing="ij")  # (H, W)
    half = torch.tan(torch.deg2rad(fov) / 2)[:, None, None]
    local = torch.stack([x * half, y * half, -torch.ones_like(x * half)], -1)  # (B, H, W, 3)
    directions = torch.einsum("bij,bhwj->bhwi", rotations, local)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    return positions[:, None, None, :].expand_as(directions), directions


def cat(parts: list[Cameras]) -> Cameras:
    """Concatenate batches of cameras."""
    return Cameras(*(torch.cat([getattr(p, k) for p in parts]) for k in ("azimuth", "elevation", "distance", "fov")))


def orbit(n: int, elevation: float = 15.0, distance: float = 3.0, fov: float = 40.0, start: float = 0.0) -> Cameras:
    """Return ``n`` cameras evenly spaced in azimuth, counter-clockwise from ``start`` degrees.

    Examples:
        >>> orbit(4).azimuth.tolist()
        [0.0, 90.0, 180.0, 270.0]
    """
    if n < 1:
        raise ValueError(f"an orbit needs at least 1 camera, got {n}")
    azimuth = start + torch.arange(n, dtype=torch.float32) * (360.0 / n)
    return Cameras(azimuth % 360, *(torch.full((n,), float(v)) for v in (elevation, distance, fov)))


@dataclass(frozen=True)
class CameraRanges:
    """The ranges of the training cameras, which are uniform in each range and look at the origin.

    Args:
        azimuth, elevation: lowest and highest, degrees; azimuth 0 looks at the front.
        distance: nearest and farthest, from the origin, scene units.
        fov: narrowest and widest vertical field of view, degrees.
        ring: number of cameras that stand evenly around the scene with one elevation, distance and field of view; the
            views of a step must be a multiple of it. 1: each camera is independent.
    """

    azimuth: Annotated[tuple[float, float], Within(-360, 720)] = (0.0, 360.0)
    elevation: Annotated[tuple[float, float], Within(-90, 90)] = (-20.0, 60.0)
    distance: Annotated[tuple[float, float], Within(1.8, 100)] = (2.8, 3.2)
    fov: Annotated[tuple[float, float], Within(1, 170)] = (38.0, 42.0)
    ring: Annotated[int, Within(1, 64)] = 1

    def __post_init__(self):
        if not 1 <= self.ring <= 64:
            raise ValueError(f"camera.ring is {self.ring}; give 1 to 64 views (4 for multi-view teachers)")
        for name, low, high in (
            ("azimuth", -360, 720),
            ("elevation", -90, 90),
            ("distance", 1.8, 100),
            ("fov", 1, 170),
        ):
            a, b = getattr(self, name)
            if not (low <= a <= b <= high):
                raise ValueError(f"camera.{name} is ({a}, {b}); give a range low <= high within [{low}, {high}]")

    def sample(self, n: int, rng: torch.Generator) -> Cameras:
        """Draw ``n`` stratified cameras.

        Each range is cut into ``n`` equal parts. Each part gives one random value; the parts are in random order,
        except for the azimuth. With rings, only the first camera of each ring is drawn, and the rings follow one
        another.
        """
        if self.ring > 1:
            assert n % self.ring == 0, (n, self.ring)
            first = dataclasses.replace(self, ring=1).sample(n // self.ring, rng)
            azimuth, *rest = (
                getattr(first, name).repeat_interleave(self.ring)
                for name in ("azimuth", "elevation", "distance", "fov")
            )
            return Cameras((azimuth + torch.arange(n) % self.ring * (360.0 / self.ring)) % 360, *rest)

        def stratified(bounds: tuple[float, float], shuffle: bool) -> Tensor:
            part = torch.arange(n) if not shuffle else torch.randperm(n, generator=rng)
            return bounds[0] + (part + torch.rand(n, generator=rng)) / n * (bounds[1] - bounds[0])

        azimuth = stratified(self.azimuth, shuffle=False)
        if math.isclose(self.azimuth[1] - self.azimuth[0], 360.0):  # the parts of a full circle may begin anywhere
            azimuth = azimuth + torch.rand(1, generator=rng) * 360.0
        rest = (stratified(bounds, shuffle=True) for bounds in (self.elevation, self.distance, self.fov))
        return Cameras(azimuth % 360, *rest)
