"""Scores against discs, spheres and boxes whose scores are known in closed form."""

import json
import math

import numpy as np
import pytest
import torch

from sds3d.evaluate.shape import (
    FAR,
    distance_to_triangles,
    distances_to,
    surface_figures,
    surface_points,
)
from sds3d.evaluate.truth import BEST_PSNR, evaluate, masked_psnr, silhouette_iou, unseen_views


class Ball:
    """A plain ball at the origin, rendered by its closed form: rays that pass within its radius."""

    def __init__(self, radius, colour=(1.0, 0.0, 0.0), resolution=64):
        self.radius, self.colour, self.resolution = radius, torch.tensor(colour), resolution

    def render(self, cameras, resolution=None):
        origins, directions = cameras.rays(resolution or self.resolution)
        nearest = torch.linalg.cross(origins, directions).norm(dim=-1)  # (B, H, W)
        coverage = (nearest < self.radius).float()[:, None]
        return coverage * self.colour[:, None, None] + 1 - coverage, coverage

    def surface(self, cameras, resolution):
        origins, directions = cameras.rays(resolution)
        middle = -(origins * directions).sum(-1)
        half = self.radius**2 - torch.linalg.cross(origins, directions).square().sum(-1)
        hit = half > 0
        depth = torch.where(hit, middle - half.clamp(min=0).sqrt(), 0)
        normals = torch.where(hit[..., None], (origins + depth[..., None] * directions) / self.radius, 0)
        return depth[:, None], normals.permute(0, 3, 1, 2), hit[:, None]

    def mesh(self, resolution=96):
        import trimesh

        return trimesh.creation.icosphere(subdivisions=4, radius=self.radius)


def disc(centre, radius, size=256):
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return (((x - centre) ** 2 + y**2) < radius**2).float()[None, None]


def test_iou_of_two_discs():
    """Overlap of two discs of radius r at distance d: 2 r^2 acos(d / 2r) - d / 2 sqrt(4 r^2 - d^2)."""
    r, d = 0.5, 0.4
    overlap = 2 * r**2 * math.acos(d / (2 * r)) - d / 2 * math.sqrt(4 * r**2 - d**2)
    expected = overlap / (2 * math.pi * r**2 - overlap)
    assert silhouette_iou(disc(-d / 2, r), disc(d / 2, r)).item() == pytest.approx(expected, abs=0.005)


def test_iou_at_its_ends():
    a, empty = disc(0, 0.5), torch.zeros(1, 1, 256, 256)
    assert silhouette_iou(a, a).item() == 1
    assert silhouette_iou(a, empty).item() == 0
    assert silhouette_iou(empty, empty).item() == 1
    assert silhouette_iou(0.49 * a, a).item() == 0 and silhouette_iou(0.51 * a, a).item() == 1  # cut at a half
    assert silhouette_iou(torch.cat([a, empty]), torch.cat([a, a])).tolist() == [1, 0]  # per view


def test_psnr_counts_the_covered_pixels_only():
    coverage = disc(0, 0.5, 64)
    true = torch.full((1, 3, 64, 64), 0.5)
    off = true + 0.1 * coverage
    assert masked_psnr(off, true, coverage).item() == pytest.approx(20.0, abs=1e-4)  # -20 log10 0.1
    outside = true + 0.4 * (1 - coverage)
    assert masked_psnr(outside, true, coverage).item() == BEST_PSNR
    half = true + 0.1 * coverage * torch.tensor([1.0, 0.0, 0.0])[:, None, None]  # one channel of three is off
    assert masked_psnr(half, true, coverage).item() == pytest.approx(20 + 10 * math.log10(3), abs=1e-4)
    assert masked_psnr(off, true, torch.zeros_like(coverage)).item() == BEST_PSNR


def test_chamfer_and_fscore_of_two_concentric_spheres():
    """Every point of one lies the difference of the radii from the other."""
    for gap, coarse, fine in ((0.1, 0, 0), (0.03, 1, 0), (0.015, 1, 1)):
        chamfer, fscore, fscore_fine, normals = surface_figures(Ball(0.5 + gap).mesh(), Ball(0.5).mesh())
        assert chamfer == pytest.approx(gap, abs=0.0002) and (fscore, fscore_fine) == (coarse, fine)
        assert normals == pytest.approx(1, abs=0.001)


def box(offset=(0.0, 0.0, 0.0), side=1.2):
    import trimesh

    found = trimesh.creation.box(extents=(side,) * 3)
    found.apply_translation(offset)
    return found


def test_a_surface_against_itself_is_at_no_distance():
    """Which is the floor of the Chamfer distance: of a cube of few triangles, and of a ball of 5,120."""
    for surface in (box(), Ball(0.6).mesh()):
        chamfer, *rest = surface_figures(surface, surface.copy())
        assert chamfer < 1e-5 and rest[:2] == [1, 1] and rest[2] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("offset", [0.001, 0.01, 0.04, 0.06])
def test_chamfer_and_fscore_of_a_moved_cube(offset):
    """Moved along x by d: two faces of six lie d from the other surface, and a strip of width d of the other four
    sticks out, by d / 2 in the mean."""
    chamfer, found, *_ = surface_figures(box(), box((offset, 0, 0)))
    side = 1.2
    faces, strips = 2 / 6 * offset, 4 / 6 * (offset / side) * offset / 2
    assert chamfer == pytest.approx(faces + strips, rel=0.05)  # but near its edges a face is closer to the sides
    beyond = max(offset - 0.05, 0) / side  # of the strips, what is not within reach
    edges = 1 - ((side - 2 * 0.05) / side) ** 2  # of the face inside the other cube, what is within reach of its sides
    assert found == pytest.approx(4 / 6 * (1 - beyond) + edges / 6 if beyond else 1, abs=0.01)


def test_distances_to_a_surface_are_those_to_its_nearest_triangle():
    """Against all triangles, and of one triangle in closed form: over its inside, an edge, a corner."""
    corner = np.array([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]])
    points = np.array([[0.2, 0.2, 0.5], [0.5, -0.3, 0.4], [-3, -4, 0], [1, 1, 0], [0.5, 0.5, 1]])
    wanted = [0.5, 0.5, 5, math.sqrt(0.5), 1]
    assert distance_to_triangles(points, corner.repeat(5, 0)) == pytest.approx(wanted)
    needle = np.array([[[0.0, 0, 0], [1, 0, 0], [0.5, 0, 0]]])  # without area
    assert distance_to_triangles(np.array([[0.5, 2.0, 0]]), needle) == pytest.approx([2])
    rng, ball = np.random.default_rng(0), Ball(0.6).mesh()
    points = rng.normal(size=(200, 3)) * 0.5
    triangles = ball.vertices[ball.faces]
    found, nearest = distances_to(triangles, points, rng)
    exact = [distance_to_triangles(p[None].repeat(len(triangles), 0), triangles).min() for p in points]
    assert (found >= np.array(exact) - 1e-12).all() and found == pytest.approx(exact, abs=1e-4)
    assert distance_to_triangles(points, triangles[nearest]) == pytest.approx(found)


def test_fscore_of_half_an_answer():
    """One of two equal, distant spheres: precision 1, recall 1/2, F 2/3; Chamfer from the missing one alone."""
    import trimesh

    left = trimesh.creation.icosphere(subdivisions=4, radius=0.2)
    right = left.copy()
    left.apply_translation([-2, 0, 0])
    right.apply_translation([2, 0, 0])
    chamfer, fscore, *_ = surface_figures(left, trimesh.util.concatenate([left, right]))
    assert fscore == pytest.approx(2 / 3, abs=0.01)
    # From the missing sphere to the nearest of the other: mean of |centre distance| - r over it, 3.8 + O(r^2 / d).
    assert chamfer == pytest.approx(3.8 / 4, abs=0.01)


def test_surface_points_are_uniform_by_area():
    """On a box: a face's share is its area's, and the mean of x^2 is the surface integral's."""
    import trimesh

    brick = trimesh.creation.box(extents=(2.0, 1.0, 0.5))
    p = surface_points(brick, 40_000, np.random.default_rng(0))
    assert np.abs(p).max(0) == pytest.approx([1, 0.5, 0.25])
    area = 2 * (2 * 1 + 2 * 0.5 + 1 * 0.5)
    top = (np.abs(p[:, 1] - 0.5) < 1e-9).mean()
    assert top == pytest.approx(2 * 0.5 / area, abs=0.01)
    x2 = (2 * (1 * 0.5) * 1 + 2 * (2 * 1 + 2 * 0.5) / 3) / area  # x = +-1 on two faces, 1/3 on the other four
    assert (p[:, 0] ** 2).mean() == pytest.approx(x2, abs=0.01)
    flat = trimesh.Trimesh([[0, 0, 0], [0, 0, 0], [0, 0, 0]], [[0, 1, 2]], process=False)
    with pytest.raises(ValueError, match="without any area"):
        surface_points(flat, 10, np.random.default_rng(0))


def test_the_unseen_views_are_fixed():
    views = unseen_views()
    assert len(views) == 24
    assert views.azimuth.tolist() == [7.5 + 15 * i for i in range(24)]
    assert views.elevation.tolist() == [0, 20, 40] * 8
    assert set(views.distance.tolist()) == {3.0} and set(views.fov.tolist()) == {40.0}


def test_a_ball_against_a_larger_one():
    """Seen from d, a ball of radius r covers a disc of radius tan(asin(r / d)): IoU is the ratio of the discs."""
    ours, true = Ball(0.5, (1.0, 0.0, 0.0), resolution=128), Ball(0.6, (1.0, 0.0, 0.0))
    scores = evaluate(ours.render, ours.mesh(), true)
    seen = [math.tan(math.asin(r / 3)) ** 2 for r in (0.5, 0.6)]
    assert scores.iou == pytest.approx(seen[0] / seen[1], abs=0.01)
    assert len(scores.view_iou) == len(scores.view_psnr) == 24
    # Wrong in the ring only, where white stands for red: two channels of three are off by 1.
    assert scores.psnr == pytest.approx(-10 * math.log10(2 / 3 * (1 - seen[0] / seen[1])), abs=0.1)
    assert scores.chamfer == pytest.approx(0.1, abs=0.0002) and scores.fscore == 0
    assert scores.topology and scores.depth_error > 0.1 and 0 < scores.missed < 1 - seen[0] / seen[1]  # misses its rim
    assert scores.truth.shape == scores.ours.shape == (24, 3, 128, 128)
    assert scores.true_clay.shape == scores.clay.shape == scores.lit.shape == (8, 3, 96, 96)
    assert list(json.loads(json.dumps(scores.numbers()))) == [
        *("iou", "psnr", "psnr_albedo", "chamfer", "fscore", "fscore_fine", "normals", "depth_error", "missed"),
        *("components", "genus", "true_components", "true_genus", "topology", "view_iou", "view_psnr"),
    ]


def test_the_truth_scores_full_marks_and_a_missing_mesh_none():
    ball = Ball(0.5)
    best = evaluate(ball.render, ball.mesh(), ball)
    assert best.iou == 1 and best.psnr == BEST_PSNR and best.fscore == 1 and best.chamfer < 1e-5
    assert best == evaluate(ball.render, ball.mesh(), ball)  # the same seed, the same score
    assert best.fscore_fine == 1 and best.normals > 1 - 1e-5 and best.depth_error < 0.001 and best.topology
    nothing = evaluate(ball.render, None, ball)
    assert nothing.chamfer is None and nothing.genus is None and not nothing.topology
    assert (nothing.fscore, nothing.fscore_fine, nothing.normals, nothing.components) == (0, 0, 0, 0)
    assert (nothing.depth_error, nothing.missed) == (FAR, 1) and (nothing.clay == 1).all()
