"""Figures of a mesh's surface, depth, pieces and handles, on solids whose figures are known in closed form."""

import math

import numpy as np
import pytest
import torch
import trimesh

from sds3d.cameras import orbit
from sds3d.data import toybox
from sds3d.evaluate.clay import AMBIENT, CLAY, LIGHT, clay_views, lit
from sds3d.evaluate.shape import FAR, depth_error, depth_views, depths, surface_figures
from sds3d.evaluate.topology import topology


def ball(radius=0.5, at=(0.0, 0.0, 0.0), subdivisions=4):
    made = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    return made.apply_translation(at)


def torus(major=0.5, minor=0.15, at=(0.0, 0.0, 0.0)):
    return trimesh.creation.torus(major, minor, major_sections=48, minor_sections=24).apply_translation(at)


def both(*meshes):
    return trimesh.util.concatenate(meshes)


def inside_out(mesh):
    return trimesh.Trimesh(mesh.vertices, mesh.faces[:, ::-1], process=False)


class Solid:
    """A mesh as its own truth, hit by the exact rays of a ball if it has a radius, else by rasterisation."""

    def __init__(self, mesh, radius=None):
        self.own, self.radius = mesh, radius

    def mesh(self):
        return self.own

    def surface(self, cameras, resolution):
        if self.radius is None:
            depth = depths(self.own, cameras, resolution)
            return (
                torch.where(depth.isinf(), 0, depth),
                torch.zeros(len(cameras), 3, *depth.shape[2:]),
                depth.isfinite(),
            )
        origins, directions = cameras.rays(resolution)
        middle = -(origins * directions).sum(-1)
        half = self.radius**2 - torch.linalg.cross(origins, directions).square().sum(-1)
        depth = torch.where(half > 0, middle - half.clamp(min=0).sqrt(), 0)[:, None]
        return depth, torch.zeros(len(cameras), 3, resolution, resolution), (half > 0)[:, None]


# Normals


def test_normals_of_a_surface_against_itself_and_inside_out():
    for mesh in (ball(), trimesh.creation.box(extents=(1, 1, 1)), torus()):
        assert surface_figures(mesh, mesh.copy())[3] == pytest.approx(1, abs=1e-4)
        assert surface_figures(inside_out(mesh), mesh)[3] == pytest.approx(-1, abs=1e-4)


def test_normals_of_a_ball_in_a_cube():
    """A point on a side of the cube, c from its middle, sees the ball's normal along its own direction from the
    centre: over a side [-1, 1]^2 at height 1, the mean of cos = 1 / sqrt(1 + x^2 + y^2). A point on the ball sees the
    side along the largest of its coordinates: the mean of the largest |n_i| over the sphere."""
    axis = (torch.arange(400, dtype=torch.float64) + 0.5) / 400 * 2 - 1
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    side = (1 + x**2 + y**2).rsqrt().mean()
    # Central projection: each direction of the sphere is a point of one side, with solid angle cos^3 dA.
    cosine = (1 + x**2 + y**2).rsqrt()
    sphere = (cosine**4).sum() / (cosine**3).sum()
    cube = trimesh.creation.box(extents=(1, 1, 1))
    for _ in range(5):
        cube = cube.subdivide()
    found = surface_figures(ball(0.4999), cube)[3]
    assert found == pytest.approx(float(side + sphere) / 2, abs=0.005)


def test_a_corrugated_surface_has_worse_normals_at_the_same_distances():
    """Waves of slope s turn the normals by atan(s), however low the waves are."""
    u = np.linspace(-0.5, 0.5, 401)
    flat = sheet(u, np.zeros_like(u))
    period, slope = 0.02, 1.0
    zigzag = sheet(u, slope * np.abs((u + period / 4) % period - period / 2))
    chamfer, fscore, fine, normals = surface_figures(zigzag, flat)
    assert chamfer < 0.01 and fscore == fine == 1
    assert normals == pytest.approx(math.cos(math.atan(slope)), abs=0.02)


def sheet(u, height):
    """A strip along x with heights y over u."""
    top = np.stack([u, height, np.full_like(u, 0.5)], -1)
    vertices = np.concatenate([top, top * [1, 1, -1]])
    i, n = np.arange(len(u) - 1), len(u)
    faces = np.concatenate([np.stack([i, i + 1, i + n], -1), np.stack([i + 1, i + n + 1, i + n], -1)])
    return trimesh.Trimesh(vertices, faces, process=False)


def test_triangles_without_area_have_no_say():
    """Marching cubes makes them, and they have no normal."""
    mesh = ball()
    spoilt = trimesh.Trimesh(mesh.vertices, np.concatenate([mesh.faces, mesh.faces[:, [0, 1, 1]]]), process=False)
    assert surface_figures(spoilt, mesh)[3] == pytest.approx(1, abs=1e-4)
    assert surface_figures(mesh, spoilt)[3] == pytest.approx(1, abs=1e-4)


# Depth


def test_depths_are_those_of_the_rays():
    cameras = depth_views()
    depth, _, hit = Solid(None, radius=0.6).surface(cameras, 64)
    ours = depths(ball(0.6, subdivisions=5), cameras, 64)
    assert (ours.isfinite() == hit).float().mean() > 0.999
    seen = hit & ours.isfinite()
    assert (ours - depth)[seen].abs().mean() < 1e-3
    assert len(cameras) == 20 and cameras.elevation.unique().tolist() == [10, 30, 45, 60, 80]


def test_a_ball_against_itself_and_against_a_smaller_one():
    truth = Solid(None, radius=0.6)
    error, missed = depth_error(ball(0.6, subdivisions=5), truth)
    assert error < 2e-3 and missed == 0
    camera = orbit(1, 0.0, distance=100, fov=1)  # nearly parallel rays, a pixel is 0.027 wide
    error, missed = depth_error(ball(0.3, subdivisions=5), truth, camera)
    assert missed == pytest.approx(1 - 0.3**2 / 0.57**2, abs=0.03)  # the rim, one pixel wide, is left out


def test_a_ball_moved_towards_the_camera_is_as_much_too_near():
    """And one moved sideways by d is off by d tan(slope): the mean over the disc of |d x / sqrt(r^2 - x^2 - y^2)|."""
    camera = orbit(1, 0.0, distance=100, fov=1)
    truth = Solid(None, radius=0.6)
    for d in (0.02, 0.1, 0.3):
        error, missed = depth_error(ball(0.6, (0, 0, d), 5), truth, camera)
        assert error == pytest.approx(d, abs=0.003) and missed == 0
    error, _ = depth_error(ball(0.6, (0.02, 0, 0), 5), truth, camera)
    depth, _, hit = truth.surface(camera, 64)
    assert 0.01 < error < 0.03


def test_a_hole_never_scores_better_than_a_surface():
    """Half a ball: where the front is gone, the far side is seen, 2 r behind; a view of nothing is worse."""
    truth, camera = Solid(None, radius=0.6), orbit(1, 0.0)
    whole = ball(0.6, subdivisions=4)
    without_front = trimesh.Trimesh(whole.vertices, whole.faces[whole.triangles_center[:, 2] < 0.3], process=False)
    little = ball(0.05)
    errors = [depth_error(mesh, truth, camera)[0] for mesh in (whole, without_front, little)]
    assert errors[0] < errors[1] < errors[2] <= FAR
    assert depth_error(ball(0.05, (0, 5, 0)), truth, camera) == (FAR, 1)


def test_the_depth_sees_a_lid():
    """A mug whose opening is a disc has its silhouettes, and the depth of its inside is wrong from above."""
    toy = toybox.parse("a red mug")
    mug = toy.mesh()
    top = float(mug.vertices[:, 1].max())
    radius = float(np.abs(mug.vertices[mug.vertices[:, 1] > top - 0.02][:, [0, 2]]).max())
    disc = trimesh.creation.cylinder(radius=radius * 0.97, height=0.02, sections=64)
    disc.apply_transform(trimesh.geometry.align_vectors([0, 0, 1], [0, 1, 0])).apply_translation([0, top - 0.02, 0])
    whole, lidded = depth_error(mug, toy), depth_error(both(mug, disc), toy)
    assert whole[0] < 0.008 and lidded[0] > 0.06
    assert whole[1] < 1e-3 and lidded[1] < 1e-3
    assert surface_figures(both(mug, disc), mug)[3] < 0.97
    assert topology(mug) == (1, 1) and topology(both(mug, disc)) == (2, 1)


# Topology


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        (ball(), (1, 0)),
        (trimesh.creation.box(extents=(1, 1, 1)), (1, 0)),
        (torus(), (1, 1)),
        (both(ball(at=(-1, 0, 0)), ball(at=(1, 0, 0))), (2, 0)),
        (both(torus(at=(-1, 0, 0)), torus(at=(1, 0, 0)), ball(at=(0, 2, 0))), (3, 2)),
        (both(ball(0.6), inside_out(ball(0.3))), (2, 0)),  # a cavity
        (both(torus(), ball(0.005, (0, 2, 0), 1), ball(0.005, (0, 1, 0), 1)), (1, 1)),  # crumbs
        (both(ball(0.5), ball(0.05, (0, 1, 0), 1)), (2, 0)),  # a tenth of the diameter is no crumb
    ],
    ids=["ball", "cube", "torus", "two balls", "two tori and a ball", "cavity", "crumbs", "small ball"],
)
def test_pieces_and_handles(mesh, expected):
    assert topology(mesh) == expected
    apart = trimesh.Trimesh(mesh.triangles.reshape(-1, 3), np.arange(3 * len(mesh.faces)).reshape(-1, 3), process=False)
    assert topology(apart) == expected  # no two faces with the same vertices, as in an STL


def test_a_mesh_that_is_not_closed_has_no_genus():
    whole = ball()
    torn = trimesh.Trimesh(whole.vertices, whole.faces[1:], process=False)
    assert topology(torn) == (1, None)
    turned = np.concatenate([whole.faces[:1, ::-1], whole.faces[1:]])
    assert topology(trimesh.Trimesh(whole.vertices, turned, process=False)) == (1, None)


def test_pieces_that_touch_at_a_vertex_stand_apart():
    """Two tetrahedra with one corner in common: two pieces without handles, where V - E + F alone gives 3 / 2."""
    corners = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0], [0, -1, 0], [0, 0, -1]])
    one = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    other = np.array([[0, 4, 5], [0, 6, 4], [0, 5, 6], [4, 6, 5]])
    assert topology(trimesh.Trimesh(corners, np.concatenate([one, other]), process=False)) == (2, 0)


@pytest.mark.parametrize(
    ("prompt", "expected"), [("a red mug", (1, 1)), ("a robot", (3, 0)), ("a cube on a cylinder", (2, 0))]
)
def test_the_toys_have_the_pieces_and_handles_that_they_show(prompt, expected):
    assert topology(toybox.parse(prompt).mesh()) == expected


# Pictures under a light


def test_clay_is_as_bright_as_its_slope_to_the_light():
    """A wall that faces the camera has n . l = the light's third coordinate; the same wall from behind is dark."""
    wall = trimesh.Trimesh([[-2, -2, 0], [2, -2, 0], [2, 2, 0], [-2, 2, 0]], [[0, 1, 2], [0, 2, 3]], process=False)
    front = torch.tensor(CLAY) * (AMBIENT + (1 - AMBIENT) * LIGHT[2])
    views = lit(wall, orbit(2, 0.0), size=8)
    assert views[0, :, 4, 4].tolist() == pytest.approx(front.tolist(), abs=0.003)
    assert views[1, :, 4, 4].tolist() == pytest.approx([c * AMBIENT for c in CLAY], abs=0.003)
    red = trimesh.Trimesh(wall.vertices, wall.faces, vertex_colors=[[200, 0, 0, 255]] * 4, process=False)
    shown = lit(red, orbit(1, 0.0), coloured=True, size=8)[0, :, 4, 4]
    assert shown.tolist() == pytest.approx([200 / 255 * float(front[0]) / CLAY[0], 0, 0], abs=0.003)


def test_the_light_comes_from_above_and_the_left():
    assert np.linalg.norm(LIGHT) == pytest.approx(1, abs=0.01)
    picture = lit(ball(0.8), orbit(1, 0.0), size=64)[0].mean(0)
    inside = slice(16, 48)
    assert picture[inside, inside][:16, :16].mean() > picture[inside, inside][16:, 16:].mean() + 0.1
    views = clay_views()
    assert len(views) == 8 and sorted(set(views.elevation.tolist())) == [20, 60]
