"""Scores of an asset against the true object: silhouettes and colours of unseen views, and surface distances.

Per view, with masks S (ours) and T (true), where coverage is at least 1/2:

    IoU  = |S and T| / |S or T|
    PSNR = -10 log10 mean over (S or T) and RGB of (ours - true)^2, both on one background; at most ``BEST_PSNR`` dB

Between the surfaces A (ours) and B (true), with points P on A and Q on B, uniform by area (Knapitsch et al. 2017):

    Chamfer = (mean_P d(p, B) + mean_Q d(q, A)) / 2, scene units
    F-score = harmonic mean of the fractions of P and of Q that lie within ``REACH`` of the other surface

where d is the distance to the surface itself, not to points on it. A surface compared with itself has a Chamfer
distance below 1e-5 and an F-score of 1; for meshes with thin triangles, such as a cone of 2,000 sides, the Chamfer
distance is up to 1e-3 (see ``distances_to``). Until November 2026, d was the distance to the nearest of 10,000 points
on the other surface; a cube of side 1.2 compared with itself then had a Chamfer distance of 0.012.
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
BEST_PSNR = 60.0  # dB; the PSNR of equal images would be infinite
POINTS = 10_000  # points on each surface
ANCHORS = 30_000  # points on a surface that are used to find its triangles near a given point
NEAR = 12  # number of anchors whose triangles are tried

Render = Callable[[Cameras], tuple[Tensor, Tensor]]  # -> images (B, 3, H, W) and coverage (B, 1, H, W)


class Truth(Protocol):
    """The true object, for example a toy of the toybox."""

    def render(self, cameras: Cameras, resolution: int) -> tuple[Tensor, Tensor]:
        """Render images (B, 3, H, W) and coverage (B, 1, H, W), both in [0, 1]."""
        ...

    def mesh(self) -> trimesh.Trimesh:
        """Return the true surface in world coordinates."""
        ...


@dataclass(frozen=True)
class Scores:
    """The scores of an asset: means over the views, and Chamfer in scene units, which is None without a mesh."""

    iou: float
    psnr: float
    chamfer: float | None
    fscore: float
    view_iou: list[float]
    view_psnr: list[float]
    truth: Tensor = field(repr=False, compare=False)  # (B, 3, H, W), views of the true object
    ours: Tensor = field(repr=False, compare=False)  # (B, 3, H, W), views of the asset

    def numbers(self) -> dict[str, float | list[float] | None]:
        """Return all scores without the images, for JSON."""
        return {name: getattr(self, name) for name in ("iou", "psnr", "chamfer", "fscore", "view_iou", "view_psnr")}


def unseen_views() -> Cameras:
    """Return the 24 fixed cameras of all scores: every 15 degrees of azimuth from 7.5, elevations 0, 20, 40 in turn."""
    index = torch.arange(VIEWS)
    elevation = torch.tensor([0.0, 20.0, 40.0])[index % 3]
    return Cameras(index * 15.0 + 7.5, elevation, torch.full((VIEWS,), 3.0), torch.full((VIEWS,), 40.0))


@torch.no_grad()
def evaluate(
    render: Render, mesh: trimesh.Trimesh | None, truth: Truth, cameras: Cameras | None = None, seed: int = 0
) -> Scores:
    """Score an asset against the true object.

    Args:
        render: cameras -> the asset's images on the truth's background, and coverage. The truth is rendered at the
            same resolution.
        mesh: the asset's surface in world coordinates; None if it has none, which gives an F-score of 0.
        truth: the true object, such as ``toybox.parse(prompt)``.
        cameras: ``unseen_views()`` by default.
        seed: seed of the points on the surfaces.
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
    """Return the intersection over union (B,) of two coverages (B, 1, H, W) in [0, 1]; 1 if both are empty."""
    assert ours.shape == true.shape, (ours.shape, true.shape)
    a, b = ours.flatten(1) >= 0.5, true.flatten(1) >= 0.5
    both, either = (a & b).sum(1), (a | b).sum(1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def masked_psnr(ours: Tensor, true: Tensor, coverage: Tensor) -> Tensor:
    """Return the PSNR (B,) in dB of images (B, 3, H, W) in [0, 1] over pixels of coverage (B, 1, H, W) >= 1/2.

    If no pixel is covered, it is ``BEST_PSNR``.
    """
    assert ours.shape == true.shape, (ours.shape, true.shape)
    mask = (coverage >= 0.5).double()
    squared = ((ours.clamp(0, 1) - true).double() ** 2 * mask).flatten(1).sum(1)
    error = squared / (3 * mask.flatten(1).sum(1)).clamp(min=1)
    return -10 * torch.log10(error.clamp(min=10 ** (-BEST_PSNR / 10)))


def surface_distances(
    ours: trimesh.Trimesh, true: trimesh.Trimesh, points: int = POINTS, seed: int = 0
) -> tuple[float, float]:
    """Return the symmetric Chamfer distance in scene units, and the F-score at ``REACH`` in [0, 1].

    Two meshes of 80,000 triangles take about 0.7 seconds on one core.
    """
    rng = np.random.default_rng(seed)
    p, q = surface_points(ours, points, rng), surface_points(true, points, rng)
    to_true, to_ours = distances_to(true, p, rng), distances_to(ours, q, rng)
    precision, recall = (to_true <= REACH).mean(), (to_ours <= REACH).mean()
    fscore = 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
    return float(to_true.mean() + to_ours.mean()) / 2, float(fscore)


def distances_to(mesh: trimesh.Trimesh, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the distance (N,) of points (N, 3) to a surface.

    It is the least distance to the triangles of the ``NEAR`` nearest anchors. Anchors are points on the surface and
    the centre of every triangle. The result is never too small. It is too large, by less than the anchors' spacing, if
    none of these anchors lies on the nearest triangle.
    """
    from scipy.spatial import KDTree

    corners = np.asarray(mesh.vertices)[np.asarray(mesh.faces)]  # (F, 3, 3)
    anchors, face = _points_on(corners, ANCHORS, rng)
    tree = KDTree(np.concatenate([anchors, corners.mean(1)]))
    face = np.concatenate([face, np.arange(len(corners))])
    near = face[tree.query(points, NEAR)[1].clip(max=len(face) - 1)]  # (N, NEAR)
    distances = [distance_to_triangles(points, corners[near[:, i]]) for i in range(NEAR)]
    return np.min(distances, axis=0)


def distance_to_triangles(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Return the distance (N,) of each point (N, 3) to its triangle (N, 3, 3), which may have no area."""
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    normal = np.cross(b - a, c - a)
    doubled = np.linalg.norm(normal, axis=1)
    edges = [_distance_to_segment(points, *ends) for ends in ((a, b), (b, c), (c, a))]
    to_edges = np.min(edges, axis=0)
    # The foot of the perpendicular is inside the triangle if it is on the inner side of all three edges.
    inner = [((np.cross(v - u, points - u) * normal).sum(1) >= 0) for u, v in ((a, b), (b, c), (c, a))]
    inside = np.all(inner, axis=0) & (doubled > 0)
    to_plane = np.abs(((points - a) * normal).sum(1)) / np.where(doubled > 0, doubled, 1)
    return np.where(inside, to_plane, to_edges)


def _distance_to_segment(points: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance (N,) of points (N, 3) to the segments from a (N, 3) to b (N, 3)."""
    along = b - a
    squared = (along**2).sum(1)
    fraction = ((points - a) * along).sum(1) / np.where(squared > 0, squared, 1)
    return np.linalg.norm(points - a - fraction.clip(0, 1)[:, None] * along, axis=1)


def surface_points(mesh: trimesh.Trimesh, points: int, rng: np.random.Generator) -> np.ndarray:
    """Draw points (points, 3) on a mesh, uniform by area.

    Raises:
        ValueError: the mesh has no area.
    """
    return _points_on(np.asarray(mesh.vertices)[np.asarray(mesh.faces)], points, rng)[0]


def _points_on(corners: np.ndarray, points: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points (points, 3) on triangles (F, 3, 3), uniform by area, and the index of each one's triangle (points,).

    Triangles are chosen at even steps along the cumulative area. A point in a triangle comes from the unit square,
    folded onto the triangle.
    """
    edges = corners[:, 1:] - corners[:, :1]  # (F, 2, 3)
    area = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=1)
    if not area.sum() > 0 or not math.isfinite(area.sum()):
        raise ValueError("a mesh without any area has no points to compare; export it again")
    summed = np.cumsum(area)
    face = np.searchsorted(summed, (np.arange(points) + rng.random()) / points * summed[-1], side="right")
    face = face.clip(max=len(area) - 1)
    u = rng.random((points, 2))
    u = np.where(u.sum(1, keepdims=True) > 1, 1 - u, u)
    return corners[face, 0] + (u[:, :, None] * edges[face]).sum(1), face
