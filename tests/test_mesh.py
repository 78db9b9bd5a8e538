"""Surfaces of solids whose answers are known."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from solids import ball, block, less, ring, solid, source, tube, union

from sds3d.cameras import orbit
from sds3d.data import toybox
from sds3d.evaluate.shape import surface_points
from sds3d.export import raster
from sds3d.export.mesh import ALIKE, extract, normals
from sds3d.export.settings import MeshConfig
from sds3d.export.source import checking_views, choosing_views


def mesh_of(density, **settings):
    """The surface as a trimesh.Trimesh; its level given, where none is asked for, so that nothing is rendered."""
    import trimesh

    skin = extract(source(density), MeshConfig(**{"level": 150.0, **settings}))
    return trimesh.Trimesh(skin.vertices, skin.faces, process=False)


SHAPES = {  # name: (signed distance, true surface, Euler number)
    "sphere": (ball(radius=0.6), lambda t: t.icosphere(5, 0.6), 2),
    "cube": (block((-0.5,) * 3, (0.5,) * 3), lambda t: t.box((1, 1, 1)), 2),
    "torus": (ring(0.5, 0.2), lambda t: t.torus(0.5, 0.2, 128, 64).apply_transform(turned()), 0),
}


def turned():
    """trimesh's torus lies around z, ours around y."""
    import trimesh

    return trimesh.transformations.rotation_matrix(math.pi / 2, (1, 0, 0))


@pytest.mark.parametrize("name", SHAPES)
def test_solids_come_back(name):
    """Hausdorff distance below 1.5 cells, watertight, one piece, the right genus, with a level that was chosen."""
    import trimesh

    inside, make, euler = SHAPES[name]
    truth, cell = make(trimesh.creation), 2 / 64
    mesh = mesh_of(solid(inside), level=None, resolution=64)
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.body_count == 1 and mesh.euler_number == euler
    rng = np.random.default_rng(0)
    p, q = surface_points(mesh, 100_000, rng), surface_points(truth, 100_000, rng)
    # A cube's corners, too, are on the truth; points on 6 square units stand up to 0.02 from their nearest neighbours.
    q = np.concatenate([q, truth.vertices])
    assert cKDTree(q).query(p)[0].max() < 1.5 * cell
    assert cKDTree(p).query(q)[0].max() < 1.5 * cell


def test_a_sphere_has_its_volume_and_its_area():
    mesh = mesh_of(solid(ball(radius=0.6), edge=0.01), resolution=64)
    assert mesh.is_watertight and mesh.is_winding_consistent
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.01)
    assert mesh.area == pytest.approx(4 * math.pi * 0.6**2, rel=0.02)  # facets make it no smaller, steps no larger


def test_normals_point_outwards():
    mesh = mesh_of(solid(ball()), resolution=32)
    assert mesh.volume > 0
    assert ((mesh.face_normals * mesh.triangles_center).sum(1) > 0).all()
    radial = mesh.vertices / np.linalg.norm(mesh.vertices, axis=1, keepdims=True)
    ours = normals(np.asarray(mesh.vertices), np.asarray(mesh.faces))
    assert (ours * radial).sum(1).min() > 0.97
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-9)


def test_a_box_lands_where_it_is():
    mesh = mesh_of(solid(block((-0.7, -0.2, 0.1), (0.3, 0.9, 0.5))), resolution=80)
    np.testing.assert_allclose(mesh.bounds, [[-0.7, -0.2, 0.1], [0.3, 0.9, 0.5]], atol=0.025)  # one voxel
    assert mesh.volume == pytest.approx(1.0 * 1.1 * 0.4, rel=0.03)


def test_what_touches_the_box_is_closed_there():
    mesh = mesh_of(solid(block((-2.0, -0.5, -0.5), (2.0, 0.5, 0.5))), resolution=40)
    assert mesh.is_watertight
    assert np.abs(mesh.vertices).max() <= 1.0
    assert mesh.extents[0] > 1.9


def test_specks_and_cavities_are_dropped():
    field = solid(union(less(ball(radius=0.6), ball(radius=0.3)), ball((0.8, 0.8, 0.8), 0.1)))
    kept = mesh_of(field, resolution=48, keep=0.05)
    assert (
        kept.volume == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.02) and kept.body_count == 1
    )  # no hole, no speck
    everything = mesh_of(field, resolution=48, keep=0.0)
    assert everything.volume == pytest.approx(4 / 3 * math.pi * (0.6**3 + 0.1**3), rel=0.02)
    assert everything.body_count == 2
    two = solid(union(ball((-0.5, 0, 0), 0.35), ball((0.5, 0, 0), 0.3)))
    assert mesh_of(two, resolution=48).body_count == 2
    assert mesh_of(two, resolution=48, keep=1.0).body_count == 1


def test_the_foam_inside_a_soft_body_is_solid():
    """Density that swings between 4 and 16 from place to place: a level of 10 alone would make a sponge of it."""

    def foam(points):
        waves = torch.sin(points * 40).prod(-1)
        return (10 + 6 * waves) * (ball(radius=0.6)(points) > 0)

    mesh = mesh_of(foam, level=10.0, resolution=64)
    assert len(mesh.faces) > 5_000  # with 5,000 it would not stay closed
    assert mesh.is_watertight and mesh.euler_number > -20  # pits in the skin may meet; a sponge has hundreds of tunnels
    assert (
        np.linalg.norm(mesh.vertices, axis=1).min() > 0.45
    )  # 0.15 of it, at 10 a unit, stop three quarters of the light


def test_what_can_be_looked_into_stays_hollow():
    """A cup's inside is seen from above."""
    cup = less(tube(0.5, -0.5, 0.6), tube(0.4, -0.35, 1.0))
    mesh = mesh_of(solid(cup), resolution=64)
    true = math.pi * (0.5**2 * 1.1 - 0.4**2 * 0.95)
    assert mesh.volume == pytest.approx(true, rel=0.05) and mesh.euler_number == 2


def test_the_foot_of_a_soft_cups_wall_stays_open():
    """Only steep rays reach it; with 26 directions, fog along the wall hid it, and a ledge stood there."""
    cup = less(tube(0.5, -0.6, 0.6), tube(0.38, -0.42, 1.0))
    mesh = mesh_of(solid(lambda p: cup(p) - 0.02, edge=0.01), level=8.0, resolution=96)
    heights = np.linspace(-0.3, 0.5, 9)
    points = np.array([(0.3 * math.cos(a), y, 0.3 * math.sin(a)) for y in heights for a in np.arange(0, 6.28, 0.2)])
    assert not mesh.contains(points).any()
    assert mesh.contains(points - [0, 0.2, 0])[: len(points) // 9].all()  # the bottom is solid


@pytest.mark.slow
@pytest.mark.parametrize("fog", [0.0, 0.5])
def test_the_chosen_level_keeps_a_hard_cup_hollow(fog):
    """A cup of density 60, with and without fog in it that no view shows; its walls lie midway between corners."""
    voxel = 1 / 32
    outer = block((-15.5 * voxel,) * 3, (15.5 * voxel,) * 3)
    inner = block((-11.5 * voxel, -9.5 * voxel, -11.5 * voxel), (11.5 * voxel, 1.0, 11.5 * voxel))
    mesh = mesh_of(lambda p: torch.where(inner(p) > 0, fog, 60.0) * (outer(p) > 0), level=None, resolution=64)
    np.testing.assert_allclose(mesh.extents, 31 * voxel, atol=0.5 * voxel)
    assert mesh.volume == pytest.approx((31**3 - 23**2 * 25) * voxel**3, rel=0.05)


@pytest.mark.slow
def test_the_chosen_level_keeps_the_outline_of_a_soft_ball():
    """Density A exp(-r^2 / 2 w^2): a ray that passes at r has optical depth A w sqrt(2 pi) exp(-r^2 / 2 w^2), so it
    lets half the light through at r^2 = 2 w^2 ln(A w sqrt(2 pi) / ln 2), whatever a level tuned to hard scenes would
    make of a peak density of 12."""
    peak, width = 12.0, 0.25
    mesh = mesh_of(lambda p: peak * torch.exp(-(p**2).sum(-1) / (2 * width**2)), level=None, resolution=64)
    radius = math.sqrt(2 * width**2 * math.log(peak * width * math.sqrt(2 * math.pi) / math.log(2)))
    # Perspective moves the outline by less than r / 60; a pixel of the 64 is 0.034, a voxel 0.031.
    np.testing.assert_allclose(np.linalg.norm(mesh.vertices, axis=1), radius, atol=0.03)


@pytest.mark.slow
def test_the_chosen_level_agrees_best():
    """No level nearby has silhouettes as good as the chosen one, up to what its search leaves."""
    scene = source(lambda p: 20 * torch.sigmoid(ball(radius=0.55)(p) / 0.06))
    chosen = extract(scene, MeshConfig(resolution=48))
    wanted = scene.view(choosing_views(), 64)[1][:, 0] >= 0.5

    def iou(level):
        skin = extract(scene, MeshConfig(resolution=48, level=level, smooth=0))
        shown = raster.silhouettes(skin.vertices, skin.faces, choosing_views(), 64)
        return float(((shown & wanted).flatten(1).sum(1) / (shown | wanted).flatten(1).sum(1)).mean())

    assert chosen.level_iou == pytest.approx(iou(chosen.level), abs=1e-6)
    assert chosen.level_iou > 0.97
    assert max(iou(chosen.level * f) for f in (0.3, 0.6, 1.6)) <= chosen.level_iou + ALIKE


@pytest.mark.slow
def test_a_rod_thinner_than_its_blur_is_still_meshed():
    skin = extract(source(solid(tube(0.02, -0.5, 0.5))), MeshConfig(resolution=96))
    assert skin.level_iou > 0.8


@pytest.mark.slow
def test_a_dense_speck_does_not_choose_the_level():
    """Many levels above the body's own density give the same little mesh."""
    body = union(ball(radius=0.3), less(ball(radius=0.6), less(ball(radius=0.7), block((-1, -0.06, -1), (1, 0.06, 1)))))

    def density(points):
        return 20 * (body(points) > 0).float() + 4000 * (ball(radius=0.05)(points) > 0).float()

    skin = extract(source(density), MeshConfig(resolution=64))
    assert skin.level < 20 and skin.level_iou > 0.9


@pytest.mark.slow
def test_a_scene_of_nearly_clear_matter_is_still_meshed():
    """Peak density 2: a ray through the middle of the ball loses 86 % of its light, one at 0.47 of 0.5 half."""
    mesh = mesh_of(lambda points: 2 * torch.sigmoid(ball()(points) / 0.01), level=None, resolution=48)
    np.testing.assert_allclose(mesh.extents, 0.94, atol=0.08)


def test_decimation_keeps_the_shape():
    fine = mesh_of(solid(ring()), resolution=64)
    coarse = mesh_of(solid(ring()), resolution=64, faces=1000)
    assert len(coarse.faces) <= 1000 < len(fine.faces)
    assert coarse.is_watertight and coarse.euler_number == 0
    assert coarse.volume == pytest.approx(fine.volume, rel=0.02)


def test_smoothing_does_not_shrink():
    rough = mesh_of(solid(ball(radius=0.6)), resolution=32, smooth=0)
    smooth = mesh_of(solid(ball(radius=0.6)), resolution=32, smooth=10)
    spread = [np.linalg.norm(m.vertices, axis=1).std() for m in (rough, smooth)]
    assert smooth.volume == pytest.approx(rough.volume, rel=0.01) and spread[1] < spread[0]


def test_narrow_holes_can_be_filled():
    holed = less(block((-0.5,) * 3, (0.5,) * 3), tube(0.05, -1.0, 1.0))
    assert mesh_of(solid(holed), resolution=64).euler_number == 0
    assert mesh_of(solid(holed), resolution=64, fill=0.16).euler_number == 2


@pytest.mark.slow
def test_cracks_are_closed_and_wider_gaps_are_not():
    """A block with a cut from above, almost to its bottom: 0.035 wide, which is a crack, or 0.15; cells are 0.021."""

    def volume(gap: float, **settings) -> float:
        cut = block((-0.45, -0.4, -gap / 2), (0.45, 1, gap / 2))
        found = source(solid(less(block((-0.5,) * 3, (0.5,) * 3), cut), edge=0.001))
        skin = extract(dataclasses.replace(found, detail=0.0), MeshConfig(level=150.0, resolution=96, **settings))
        a, b, c = (skin.vertices[skin.faces[:, i]] for i in range(3))
        return float((a * np.cross(b, c)).sum() / 6)

    for gap, wide in ((0.035, {}), (0.15, {"fill": 0.2})):
        lost = 0.9 * 0.9 * gap
        assert volume(gap, **wide) == pytest.approx(1, abs=0.3 * lost)
        assert volume(gap, fill=0.0) < 1 - 0.5 * lost
    assert volume(0.15) == pytest.approx(1 - 0.9 * 0.9 * 0.15, abs=0.03)


def test_a_gap_that_parts_two_bodies_is_no_crack():
    """Two halves of a block, 0.045 apart, stay two however large the filling: one can look through."""
    import trimesh

    field = less(block((-0.5,) * 3, (0.5,) * 3), block((-1, -1, -0.0225), (1, 1, 0.0225)))
    skin = extract(source(solid(field, edge=0.001)), MeshConfig(level=150.0, resolution=96, fill=0.2))
    assert trimesh.Trimesh(skin.vertices, skin.faces, process=False).body_count == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "prompt, pieces, handles", [("a red mug", 1, 1), ("a grey robot", 3, 0), ("a red teapot", 1, 1)]
)
def test_openings_stay_open_however_wide_the_filling(prompt, pieces, handles):
    """The space between a robot's arms and its body is 0.05 wide, a mug's handle could hold a filling of 0.3."""
    import trimesh

    toy = toybox.parse(prompt)
    found = source(lambda points: 300 * torch.sigmoid(-toy.sdf(points) / 0.002))
    for fill in (0.05, 0.3):
        skin = extract(found, MeshConfig(resolution=96, fill=fill))
        bodies = trimesh.Trimesh(skin.vertices, skin.faces, process=False).split(only_watertight=False)
        assert len(bodies) == pieces, (fill, len(bodies))
        assert sum(1 - body.euler_number // 2 for body in bodies) == handles, fill


def test_views_that_judge_had_no_part_in_the_choice():
    assert len(choosing_views()) == len(checking_views()) == 12
    apart = torch.cdist(choosing_views().positions(), checking_views().positions())
    assert apart.min() > 0.3
    assert torch.cdist(orbit(1).positions(), checking_views().positions()).min() < 1e-5  # the front is judged


def test_emptiness_is_told_in_one_sentence():
    with pytest.raises(
        ValueError, match=r"largest opacity from 12 views is 0\.0\d+ and a surface needs 0.5.*more steps"
    ):
        extract(source(lambda points: torch.full((len(points),), 0.02)), MeshConfig(resolution=16))
    with pytest.raises(ValueError, match="the scene is empty"):
        extract(source(lambda points: torch.zeros(len(points))), MeshConfig(resolution=16))
    with pytest.raises(ValueError, match="level is 5e\\+03; give a lower level"):
        extract(source(lambda p: 0.3 * torch.sigmoid(ball()(p) / 0.01)), MeshConfig(resolution=16, level=5000.0))
    with pytest.raises(ValueError, match="not finite"):
        extract(source(lambda points: points[:, 0] * float("nan")), MeshConfig(resolution=16))


@pytest.mark.parametrize(
    "bad", [{"resolution": 4}, {"resolution": 5000}, {"keep": 2.0}, {"level": -1.0}, {"fill": 3.0}, {"faces": 3}]
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        MeshConfig(**bad)
