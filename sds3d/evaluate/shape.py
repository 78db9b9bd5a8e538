"""Scores of a mesh against the true surface: distances, normals, depths, and topology.

Between the surfaces A (ours) and B (true), with points P on A and Q on B, uniform by area (Knapitsch et al. 2017), and
with d, the distance to the nearest triangle of the other surface:

    Chamfer = (mean_P d(p, B) + mean_Q d(q, A)) / 2, scene units
    F-score = harmonic mean of the fractions of P and of Q that lie within ``REACH`` of the other surface, or, for
              ``fscore_fine``, within ``FINE``
    normals = (mean_P n(p) . n_B(p) + mean_Q n(q) . n_A(q)) / 2, where n is the normal of the triangle that holds the
              point and n_A, n_B those of the nearest triangles. The cosine has its sign: a surface that is inside out
              has -1. (The normal consistency of Occupancy Networks, arXiv 1812.03828, takes the absolute value.)

A surface compared with itself has a Chamfer distance below 1e-5, F-scores of 1, and normals above 0.9999, since of a
point beside a sharp edge the triangle around the corner may be taken. For meshes with thin triangles, such as a cone of
2,000 sides, the Chamfer distance is up to 1e-3 (see ``distances_to``). Until November 2026, d was the distance to the
nearest of 10,000 points on the other surface; a cube of side 1.2 compared with itself then had a Chamfer distance of
0.012.

Depths are distances from the camera along the rays through the pixels' centres, from ``depth_views()``: the true ones
are exact, ours are those of the rasterised mesh (export/raster.py). T are the pixels of all views where the truth is
hit, and in all eight pixels around them, too; the rim is left to the silhouettes. With

    e = min(|ours - true|, FAR) where ours is hit, FAR where it is not

the depth error is the mean of e over T, in scene units, and ``missed`` the fraction of T where ours is not hit. No
error is larger than that of a miss, so a hole never scores better than a surface.

Components and genus are defined in topology.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from sds3d.cameras import Cameras, cat, orbit
from sds3d.evaluate.topology import topology
from sds3d.export import raster

if TYPE_CHECKING:
    import trimesh

REACH, FINE = 0.05, 0.02  # scene units
POINTS = 10_000  # points on each surface
ANCHORS = 30_000  # points on a surface that are used to find its triangles near a given point
NEAR = 12  # number of anchors whose triangles are tried
FAR = 0.5  # scene units, the largest error of a depth
DEPTH_SIZE = 64  # pixels a side of the views whose depths are compared


class TrueShape(Protocol):
    """A true object, as far as its shape is concerned."""

    def surface(self, cameras: Cameras, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the rays through the pixels' centres hit.

        Returns:
            Distances from the camera (B, 1, H, W), normals (B, 3, H, W), and whether the ray hits, (B, 1, H, W) bool.
        """
        ...

    def mesh(self) -> trimesh.Trimesh:
        """Return the true surface in world coordinates."""
        ...


@dataclass(frozen=True)
class Shape:
    """The figures of a mesh against the true surface; the module's docstring defines them.

    Without a mesh, chamfer and genus are None, the components 0, and the other figures the worst that there are.
    """

    chamfer: float | None
    fscore: float
    fscore_fine: float
    normals: float
    depth_error: float
    missed: float
    components: int
    genus: int | None
    true_components: int
    true_genus: int | None

    @property
    def topology(self) -> bool:
        """Whether the mesh is closed and has as many components and handles as the truth."""
        return self.genus is not None and (self.components, self.genus) == (self.true_components, self.true_genus)


def compare(ours: trimesh.Trimesh | None, truth: TrueShape, true: trimesh.Trimesh, seed: int = 0) -> Shape:
    """Compare a mesh in world coordinates with the true surface. It takes about 3 seconds on one core.

    Args:
        ours: None if there is no mesh.
        truth: the true object.
        true: the true object's mesh.
        seed: seed of the points on the surfaces.
    """
    true_components, true_genus = topology(true)
    if ours is None:
        return Shape(None, 0.0, 0.0, 0.0, FAR, 1.0, 0, None, true_components, true_genus)
    chamfer, fscore, fine, normals = surface_figures(ours, true, seed=seed)
    error, missed = depth_error(ours, truth)
    return Shape(chamfer, fscore, fine, normals, error, missed, *topology(ours), true_components, true_genus)


def surface_figures(
    ours: trimesh.Trimesh, true: trimesh.Trimesh, points: int = POINTS, seed: int = 0
) -> tuple[float, float, float, float]:
    """Return the Chamfer distance in scene units, the F-scores at ``REACH`` and at ``FINE``, and normals.

    Two meshes of 80,000 triangles take about 0.7 seconds on one core.
    """
    rng = np.random.default_rng(seed)
    a, b = _corners(ours), _corners(true)
    p, on_a = _points_on(a, points, rng)
    q, on_b = _points_on(b, points, rng)
    to_true, near_b = distances_to(b, p, rng)
    to_ours, near_a = distances_to(a, q, rng)
    normals_a, normals_b = _normals(a), _normals(b)
    cosines = [(normals_a[i] * normals_b[j]).sum(1).mean() for i, j in ((on_a, near_b), (near_a, on_b))]
    coarse, fine = (_fscore(to_true, to_ours, reach) for reach in (REACH, FINE))
    return float(to_true.mean() + to_ours.mean()) / 2, coarse, fine, float(sum(cosines)) / 2


def _fscore(to_true: np.ndarray, to_ours: np.ndarray, reach: float) -> float:
    """The harmonic mean of the fractions of two sets of distances that are at most ``reach``."""
    precision, recall = (to_true <= reach).mean(), (to_ours <= reach).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall > 0 else 0.0


def distances_to(corners: np.ndarray, points: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances (N,) of points (N, 3) to the triangles (F, 3, 3) of a surface, and the nearest ones (N,).

    A distance is the least to the triangles of the ``NEAR`` nearest anchors. Anchors are points on the surface and
    the centre of every triangle. The result is never too small. It is too large, by less than the anchors' spacing, if
    none of these anchors lies on the nearest triangle.
    """
    from scipy.spatial import KDTree

    anchors, face = _points_on(corners, ANCHORS, rng)
    tree = KDTree(np.concatenate([anchors, corners.mean(1)]))
    face = np.concatenate([face, np.arange(len(corners))])
    near = face[tree.query(points, NEAR)[1].clip(max=len(face) - 1)]  # (N, NEAR)
    distances = np.stack([distance_to_triangles(points, corners[near[:, i]]) for i in range(NEAR)])
    best = distances.argmin(0)
    every = np.arange(len(points))
    return distances[best, every], near[every, best]


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
    return _points_on(_corners(mesh), points, rng)[0]


def _corners(mesh: trimesh.Trimesh) -> np.ndarray:
    """The triangles (F, 3, 3) of a mesh, without those that have no area, which have no normal."""
    corners = np.asarray(mesh.vertices, dtype=np.float64)[np.asarray(mesh.faces)]
    return corners[np.linalg.norm(_doubled(corners), axis=1) > 0]


def _doubled(corners: np.ndarray) -> np.ndarray:
    """The normals (F, 3) of triangles (F, 3, 3), two times their area long."""
    return np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])


def _normals(corners: np.ndarray) -> np.ndarray:
    """The unit normals (F, 3) of triangles (F, 3, 3) that have an area."""
    normals = _doubled(corners)
    return normals / np.linalg.norm(normals, axis=1, keepdims=True)


def _points_on(corners: np.ndarray, points: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points (points, 3) on triangles (F, 3, 3), uniform by area, and the index of each one's triangle (points,).

    Triangles are chosen at even steps along the cumulative area. A point in a triangle comes from the unit square,
    folded onto the triangle.
    """
    edges = corners[:, 1:] - corners[:, :1]  # (F, 2, 3)
    area = np.linalg.norm(_doubled(corners), axis=1)
    if not area.sum() > 0 or not math.isfinite(area.sum()):
        raise ValueError("a mesh without any area has no points to compare; export it again")
    summed = np.cumsum(area)
    face = np.searchsorted(summed, (np.arange(points) + rng.random()) / points * summed[-1], side="right")
    face = face.clip(max=len(area) - 1)
    u = rng.random((points, 2))
    u = np.where(u.sum(1, keepdims=True) > 1, 1 - u, u)
    return corners[face, 0] + (u[:, :, None] * edges[face]).sum(1), face


def depth_views() -> Cameras:
    """Return the 20 fixed cameras of the depth error: elevations 10, 30, 45, 60 and 80, four azimuths each."""
    starts = {10.0: 0.0, 30.0: 18.0, 45.0: 36.0, 60.0: 54.0, 80.0: 72.0}  # elevation -> azimuth of its first camera
    return cat([orbit(4, elevation, start=start) for elevation, start in starts.items()])


def depth_error(ours: trimesh.Trimesh, truth: TrueShape, cameras: Cameras | None = None) -> tuple[float, float]:
    """Return the mean depth error in scene units, and the fraction of the true pixels that ours misses.

    If no pixel of the truth lies inside its silhouette, both are 0.
    """
    cameras = depth_views() if cameras is None else cameras
    true, _, hit = truth.surface(cameras, DEPTH_SIZE)
    inside = torch.nn.functional.max_pool2d((~hit).float(), 3, stride=1, padding=1) == 0
    depth = depths(ours, cameras, DEPTH_SIZE)[inside]  # a miss is infinitely far
    error = (depth - true[inside]).abs().clamp(max=FAR)
    count = max(len(depth), 1)
    return float(error.double().sum() / count), float(depth.isinf().sum() / count)


def depths(mesh: trimesh.Trimesh, cameras: Cameras, size: int) -> Tensor:
    """Return the distances from the camera at which rays hit a mesh, (B, 1, size, size), infinite where none is hit."""
    faces = torch.from_numpy(np.asarray(mesh.faces, dtype=np.int64).copy())
    points = torch.from_numpy(np.asarray(mesh.vertices, dtype=np.float32).copy())
    views = []
    for eye, screen in zip(cameras.positions(), raster.project(np.asarray(mesh.vertices), cameras, size)):
        face, weights = raster.nearest(screen, faces, size)
        hit = (weights[..., None] * points[faces[face]]).sum(1)  # where the face is -1, the last one's weights are 0
        views.append(torch.where(face >= 0, (hit - eye).norm(dim=-1), torch.inf).view(1, size, size))
    return torch.stack(views)
