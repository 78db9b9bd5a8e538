"""Renders the toybox's kinds by sphere tracing, many images at once.

The light is fixed relative to the object and half-Lambertian, so that one static scene can match every view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sds3d import domains
from sds3d.cameras import Cameras
from sds3d.data.kinds import Kind
from sds3d.prompts import COLOURS

LIGHT = (0.42, 0.78, 0.46)  # unit direction towards the light, object axes
AMBIENT = 0.4
BOUND = 1.05  # radius of a ball that contains every kind at scale 1
_STEPS = 64
_HIT = 2e-3

# The layers of `trace`. A pixel's value is the mean over its rays, and a ray that misses gives 0.
LAYERS = 17
LIT = slice(0, 5)  # brightness of the main colour's parts, of the second colour's parts, RGB of the other parts
COVERAGE = slice(5, 6)
UNLIT = slice(6, 11)  # as LIT, without the light
NORMAL = slice(11, 14)  # outward unit normals in object axes
POSITION = slice(14, 17)  # of the visible point, in world coordinates, clamped to the box [-1, 1]^3


def part_distances(kind: Kind, points: Tensor) -> Tensor:
    """Return the signed distance to each part, (N, 3) -> (N, P)."""
    return torch.stack([solid(points) for solid, _ in kind.parts], -1)


def normals(kind: Kind, points: Tensor, step: float = 2e-3) -> Tensor:
    """Return outward unit normals by tetrahedral finite differences, (N, 3) -> (N, 3)."""
    corners = points.new_tensor([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])
    stacked = (points[None] + step * corners[:, None]).reshape(-1, 3)
    distance = part_distances(kind, stacked).amin(-1).view(4, -1, 1)
    gradient = (distance * corners[:, None]).sum(0)
    return gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-9)


def shade(normal: Tensor) -> Tensor:
    """Return the brightness in [AMBIENT, 1] of unit normals, (..., 3) -> (...)."""
    return AMBIENT + (1 - AMBIENT) * (0.5 + 0.5 * normal @ normal.new_tensor(LIGHT))


def _march(kind: Kind, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """First hits of (R, 3) rays: indices (M,) of the rays that hit, and the points (M, 3)."""
    middle = -(origins * directions).sum(-1)  # t of the point nearest to the origin
    gap = (origins + middle[:, None] * directions).square().sum(-1)
    index = (gap < BOUND**2).nonzero()[:, 0]
    half = (BOUND**2 - gap[index]).sqrt()
    t, far = middle[index] - half, middle[index] + half
    hits, points = [], []
    for _ in range(_STEPS):
        at = origins[index] + t[:, None] * directions[index]
        distance = part_distances(kind, at).amin(-1)
        hit = distance < _HIT
        if hit.any():
            hits.append(index[hit])
            points.append(at[hit])
        t = t + distance * 0.95
        keep = ~hit & (t < far)
        index, t, far = index[keep], t[keep], far[keep]
        if index.numel() == 0:
            break
    if not hits:
        return index[:0], origins[:0]
    return torch.cat(hits), torch.cat(points)


@torch.no_grad()
def trace(kind: Kind, cameras: Cameras, scale: Tensor, resolution: int = 64, supersample: int = 2) -> Tensor:
    """Render one kind from B cameras as colourless layers, which `paint` colours.

    Args:
        scale: (B,) size of each object.
        supersample: rays per side of a pixel.

    Returns:
        (B, LAYERS, resolution, resolution); NORMAL and POSITION in [-1, 1], the others in [0, 1].
    """
    batch, side = len(cameras), resolution * supersample
    origins, directions = cameras.rays(side)
    origins = (origins / scale[:, None, None, None]).reshape(-1, 3)  # scales the camera's distance, not the object
    rays, points = _march(kind, origins, directions.reshape(-1, 3))
    out = torch.zeros(batch * side * side, LAYERS)
    if rays.numel():
        unlit, normal = _slots(kind)[part_distances(kind, points).argmin(-1)], normals(kind, points)
        bright, place = shade(normal)[:, None], points * scale[rays // side**2, None]
        out[rays] = torch.cat([unlit * bright, torch.ones_like(bright), unlit, normal, place.clamp(-1, 1)], -1)
    image = out.view(batch, side, side, LAYERS).permute(0, 3, 1, 2)
    return torch.nn.functional.avg_pool2d(image, supersample) if supersample > 1 else image


def _slots(kind: Kind) -> Tensor:
    """The values of each part in the five colour layers at full brightness, (P, 5)."""
    rows = {"main": (1.0, 0.0, 0.0, 0.0, 0.0), "second": (0.0, 1.0, 0.0, 0.0, 0.0)}
    return torch.tensor([rows.get(slot) or (0.0, 0.0, *COLOURS[slot]) for _, slot in kind.parts])


def paint(layers: Tensor, main: Tensor, second: Tensor, lit: bool = True) -> tuple[Tensor, Tensor]:
    """Colour the layers of `trace`.

    Args:
        layers: (B, LAYERS, H, W).
        main, second: (B, 3) RGB in [0, 1].
        lit: whether the light of the toybox falls on the object.

    Returns:
        RGB times coverage, (B, 3, H, W), and coverage, (B, 1, H, W).
    """
    slots = layers[:, LIT if lit else UNLIT]
    rgb = slots[:, :1] * main[:, :, None, None] + slots[:, 1:2] * second[:, :, None, None] + slots[:, 2:]
    return rgb, layers[:, COVERAGE]


def relit(images: Tensor, coverage: Tensor, normals: Tensor, background: Tensor) -> Tensor:
    """Return images (B, 3, H, W) without light, on a background (3,), under the toybox's light.

    Args:
        coverage: (B, 1, H, W).
        normals: (B, 3, H, W) outward normals in world axes, of any length.
    """
    behind = (1 - coverage) * background[:, None, None]
    unit = torch.nn.functional.normalize(normals, dim=1)
    return (images - behind) * shade(unit.permute(0, 2, 3, 1))[:, None] + behind


def domain_images(
    layers: Tensor, main: Tensor, second: Tensor, background: Tensor, domain: str, cameras: Cameras
) -> Tensor:
    """Return images (B, 3, H, W) in [0, 1] of one domain.

    Args:
        layers: (B, LAYERS, H, W), of `trace`.
        main, second: (B, 3) RGB in [0, 1].
        background: (B, 3) RGB behind the object, for the domains colours and albedo.
        domain: a key of `sds3d.domains.WORDS`.
        cameras: the B cameras of the layers.
    """
    if domain == "normals":
        return domains.picture(domains.turned(layers[:, NORMAL], cameras.rotations()))
    if domain == "depths":
        return domains.picture(domains.heights(layers[:, POSITION], cameras.positions()))
    rgb, coverage = paint(layers, main, second, lit=domain == "colours")
    return rgb + (1 - coverage) * background[:, :, None, None]
