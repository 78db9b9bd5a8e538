"""An asset against the truth: silhouettes and colours from unseen views, and distances between the surfaces.

Per view, with masks S (ours) and T (true), coverage cut at 1/2:

    IoU  = |S and T| / |S or T|
    PSNR = -10 log10 mean over (S or T) and RGB of (ours - true)^2, both on one background; at most ``BEST_PSNR`` dB

Between the surfaces, with points P on ours and Q on the true one, spread evenly by area (Knapitsch et al. 2017):

    Chamfer = (mean_P min_Q |p - q| + mean_Q min_P |q - p|) / 2, scene units
    F-score = harmonic mean of the shares of P and of Q that lie within ``REACH`` of the other surface
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from sds3d.cameras import Cameras

if TYPE_CHECKING:
    import trimesh

VIEWS = 24
REACH = 0.05  # scene units
BEST_PSNR = 60.0  # dB; equal images have no finite PSNR
POINTS = 10_000  # on each surface

Render = Callable[[Cameras], tuple[Tensor, Tensor]]  # -> images (B, 3, H, W) and coverage (B, 1, H, W)


class Truth(Protocol):
    """What a score needs to know of the true object; the toybox's toys have it."""

    def render(self, cameras: Cameras, resolution: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) and coverage (B, 1, H, W), both in [0, 1]."""

    def mesh(self) -> trimesh.Trimesh:
        """The true surface in world coordinates."""


@dataclass(frozen=True)
class Scores:
    """How close an asset is. Means over the views; Chamfer in scene units, None where there is no mesh."""

    iou: float
    psnr: float
    chamfer: float | None
    fscore: float
    view_iou: list[float]
    view_psnr: list[float]
    truth: Tensor = field(repr=False, compare=False)  # (B, 3, H, W), what the true object looks like
    ours: Tensor = field(repr=False, compare=False)  # (B, 3, H, W)

    def numbers(self) -> dict[str, float | list[float] | None]:
        """Everything but the images, ready for JSON."""
        return {name: getattr(self, name) for name in ("iou", "psnr", "chamfer", "fscore", "view_iou", "view_psnr")}


def unseen_views() -> Cameras:
    """The 24 fixed cameras of every figure: each 15 degrees of azimuth from 7.5, elevations 0, 20, 40 in turn."""
    index = torch.arange(VIEWS)
    elevation = torch.tensor([0.0, 20.0, 40.0])[index % 3]
    return Cameras(index * 15.0 + 7.5, elevation, torch.full((VIEWS,), 3.0), torch.full((VIEWS,), 40.0))


@torch.no_grad()
def evaluate(
    render: Render, mesh: trimesh.Trimesh | None, truth: Truth, cameras: Cameras | None = None, seed: int = 0
) -> Scores:
    """Score an asset against the true object.

    Args:
        render: cameras -> the asset's images, on the truth's background, and coverage; its resolution is the
            comparison's.
        mesh: the asset's surface in world coordinates, or None where it has none (F-score 0).
        truth: the true object, such as ``toybox.parse(prompt)``.
        cameras: ``unseen_views()`` by default.
        seed: of the points on the surfaces.
    """
    cameras = unseen_views() if cameras is None else cameras
    ours, coverage = (x.detach().float().cpu() for x in render(cameras))
    true, true_coverage = (x.detach().float().cpu() for x in truth.render(cameras, resolution=ours.shape[-1]))
    ious = silhouette_iou(coverage, true_coverage)
    psnrs = masked_psnr(ours, true, torch.maximum(coverage, true_coverage))
    chamfer, fscore = None, 0.0
    if mesh is not None:
        chamfer, fscore = surface_distances(mesh, truth.mesh(), seed=seed)
    return Scores(ious.mean().item(), psnrs.mean().item(), chamfer, fscore, ious.tolist(), psnrs.tolist(), true, ours)


def silhouette_iou(ours: Tensor, true: Tensor) -> Tensor:
    """Intersection over union (B,) of two coverages (B, 1, H, W) in [0, 1]; 1 where both are empty."""
    assert ours.shape == true.shape, (ours.shape, true.shape)
    a, b = ours.flatten(1) >= 0.5, true.flatten(1) >= 0.5
    both, either = (a & b).sum(1), (a | b).sum(1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def masked_psnr(ours: Tensor, true: Tensor, coverage: Tensor) -> Tensor:
    """PSNR (B,) in dB of images (B, 3, H, W) in [0, 1], over the pixels whose coverage (B, 1, H, W) is at least 1/2.

    Where no pixel is covered there is nothing to get wrong: ``BEST_PSNR``.
    """
    assert ours.shape == true.shape, (ours.shape, true.shape)
    mask = (coverage >= 0.5).double()
    squared = ((ours.clamp(0, 1) - true).double() ** 2 * mask).flatten(1).sum(1)
    error = squared / (3 * mask.flatten(1).sum(1)).clamp(min=1)
    return -10 * torch.log10(error.clamp(min=10 ** (-BEST_PSNR / 10)))


def surface_distances(
    ours: trimesh.Trimesh, true: trimesh.Trimesh, points: int = POINTS, seed: int = 0
) -> tuple[float, float]:
    """Symmetric Chamfer distance (scene units) and F-score at ``REACH`` (in [0, 1]), both floats."""
    from scipy.spatial import cKDTree

    rng = np.random.default_rng(seed)
    p, q = surface_points(ours, points, rng), surface_points(true, points, rng)
    to_true, to_ours = cKDTree(q).query(p)[0], cKDTree(p).query(q)[0]
    precision, recall = (to_true <= REACH).mean(), (to_ours <= REACH).mean()
    fscore = 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
    return float(to_true.mean() + to_ours.mean()) / 2, float(fscore)


def surface_points(mesh: trimesh.Trimesh, points: int, rng: np.random.Generator) -> np.ndarray:
    """Points (points, 3) on a mesh, uniform by area.

    Faces by their share, at even steps along the summed area (so that every part gets its due), and in a face a
    place in the unit square, folded onto the triangle.
    """
    corners = np.asarray(mesh.vertices)[np.asarray(mesh.faces)]  # (F, 3, 3)
    edges = corners[:, 1:] - corners[:, :1]  # (F, 2, 3)
    area = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1)
    if not area.sum() > 0 or not math.isfinite(area.sum()):
        raise ValueError("a mesh without any area has no points to compare; export it again")
    summed = np.cumsum(area)
    face = np.searchsorted(summed, (np.arange(points) + rng.random()) / points * summed[-1], side="right")
    face = face.clip(max=len(area) - 1)
    u = rng.random((points, 2))
    u = np.where(u.sum(1, keepdims=True) > 1, 1 - u, u)
    return corners[face, 0] + (u[:, :, None] * edges[face]).sum(1)
