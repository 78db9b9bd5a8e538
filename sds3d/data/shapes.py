"""Signed distance functions of simple solids, in torch: negative inside, positive outside, scene units.

Each function returns a closure ``(N, 3) -> (N,)``. The distances are exact, except for `ellipsoid`, `roof` and the
results of `subtract` and `intersect`, which are lower bounds that suffice for sphere tracing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Solid = Callable[[Tensor], Tensor]
Triple = Sequence[float]
_AXES = {"x": (1, 2, 0), "y": (0, 2, 1), "z": (0, 1, 2)}  # two radial axes, then the axis itself


def _shift(points: Tensor, centre: Triple) -> Tensor:
    return points - points.new_tensor(centre)


def _box_distance(excess: Tensor) -> Tensor:
    """Signed distance to a box from the excess of each coordinate over its half-size, (N, K) -> (N,)."""
    return excess.clamp_min(0).norm(dim=-1) + excess.amax(-1).clamp_max(0)


def sphere(centre: Triple, radius: float) -> Solid:
    """A ball."""
    return lambda p: _shift(p, centre).norm(dim=-1) - radius


def ellipsoid(centre: Triple, radii: Triple) -> Solid:
    """An ellipsoid with half-axes ``radii``."""

    def distance(p: Tensor) -> Tensor:
        q, r = _shift(p, centre), p.new_tensor(radii)
        k0, k1 = (q / r).norm(dim=-1), (q / (r * r)).norm(dim=-1)
        return torch.where(k1 > 1e-6, k0 * (k0 - 1) / k1.clamp_min(1e-6), -min(radii))

    return distance


def box(centre: Triple, half: Triple, rounding: float = 0.03) -> Solid:
    """A box with half-sizes ``half``, which include its rounded edges."""
    return lambda p: _box_distance(_shift(p, centre).abs() - (p.new_tensor(half) - rounding)) - rounding


def cylinder(centre: Triple, radius: float, half_height: float, axis: str = "y", rounding: float = 0.02) -> Solid:
    """A cylinder along an axis; its radius and height include its rounded edges."""
    a, b, c = _AXES[axis]

    def distance(p: Tensor) -> Tensor:
        q = _shift(p, centre)
        radial = torch.hypot(q[:, a], q[:, b]) - (radius - rounding)
        along = q[:, c].abs() - (half_height - rounding)
        return _box_distance(torch.stack([radial, along], -1)) - rounding

    return distance


def frustum(centre: Triple, bottom: float, top: float, half_height: float) -> Solid:
    """A truncated cone along y, with radius ``bottom`` at -half_height and ``top`` at +half_height."""

    def distance(p: Tensor) -> Tensor:
        q = _shift(p, centre)
        r, y = torch.hypot(q[:, 0], q[:, 2]), q[:, 1]
        cap_r = (r - torch.where(y < 0, bottom, top)).clamp_min(0)
        cap = cap_r**2 + (y.abs() - half_height) ** 2
        edge_r, edge_y = top - bottom, 2 * half_height
        along = ((r - bottom) * edge_r + (y + half_height) * edge_y) / (edge_r**2 + edge_y**2)
        along = along.clamp(0, 1)
        side = (r - bottom - along * edge_r) ** 2 + (y + half_height - along * edge_y) ** 2
        outward = (r - bottom) * edge_y - (y + half_height) * edge_r
        inside = (outward < 0) & (y.abs() < half_height)
        return torch.minimum(cap, side).sqrt() * torch.where(inside, -1.0, 1.0)

    return distance


def torus(centre: Triple, major: float, minor: float, axis: str = "y") -> Solid:
    """A torus around an axis: ``major`` is the radius of the ring, ``minor`` that of the tube."""
    a, b, c = _AXES[axis]

    def distance(p: Tensor) -> Tensor:
        q = _shift(p, centre)
        return torch.hypot(torch.hypot(q[:, a], q[:, b]) - major, q[:, c]) - minor

    return distance


def capsule(start: Triple, end: Triple, radius: float) -> Solid:
    """A rod with round ends, whose centres are ``start`` and ``end``."""

    def distance(p: Tensor) -> Tensor:
        a, b = p.new_tensor(start), p.new_tensor(end)
        along = (((p - a) @ (b - a)) / (b - a).dot(b - a)).clamp(0, 1)
        return (p - a - along[:, None] * (b - a)).norm(dim=-1) - radius

    return distance


def roof(centre: Triple, half_width: float, height: float, half_depth: float) -> Solid:
    """A triangular prism along z: base of half-width ``half_width`` at y = centre, ridge at ``height`` above."""
    slope = (half_width**2 + height**2) ** 0.5

    def distance(p: Tensor) -> Tensor:
        q = _shift(p, centre)
        side = (q[:, 0].abs() * height + q[:, 1] * half_width - half_width * height) / slope
        return torch.stack([side, -q[:, 1], q[:, 2].abs() - half_depth], -1).amax(-1)

    return distance


def subtract(solid: Solid, hole: Solid) -> Solid:
    """The solid without the hole."""
    return lambda p: torch.maximum(solid(p), -hole(p))


def intersect(*solids: Solid) -> Solid:
    """The intersection of solids."""
    return lambda p: torch.stack([s(p) for s in solids], -1).amax(-1)


def union(*solids: Solid) -> Solid:
    """The union of solids."""
    return lambda p: torch.stack([s(p) for s in solids], -1).amin(-1)


def above(height: float) -> Solid:
    """The half-space y > height."""
    return lambda p: height - p[:, 1]
