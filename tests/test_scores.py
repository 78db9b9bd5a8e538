"""The check of a mesh against its scene: good meshes pass, and each kind of wrong one is noticed."""

import dataclasses

import numpy as np
import pytest
import torch
from solids import ball, less, plain, solid, source, tube, union

from sds3d.cameras import orbit
from sds3d.export import raster
from sds3d.export.exporter import Export
from sds3d.export.mesh import extract, normals
from sds3d.export.model import Model
from sds3d.export.scores import LEAST, MOST, beyond_bounds, picture_scores, shape_scores
from sds3d.export.settings import MeshConfig
from sds3d.export.source import Seen, checking_views

CUP = less(tube(0.5, -0.6, 0.6), tube(0.4, -0.45, 1.0))
LIDDED = union(CUP, tube(0.45, 0.5, 0.56))
PIXELS = 96


def good(vertices, faces):
    return vertices, faces


def lidded(vertices, faces):
    """A disc over the opening, seen from above."""
    angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    rim = 0.45 * np.stack([np.cos(angle), 0 * angle, np.sin(angle)], 1)
    disc = np.concatenate([[[0.0, 0.0, 0.0]], rim]) + [0, 0.55, 0]
    fan = np.array([(0, 1 + (i + 1) % 32, 1 + i) for i in range(32)])
    return np.concatenate([vertices, disc]), np.concatenate([faces, fan + len(vertices)])


def cratered(vertices, faces):
    """0.4 wide and 0.2 deep, in the front."""
    far = np.linalg.norm(vertices - [0, 0, 0.5], axis=1)
    return vertices - 0.2 * np.clip(1 - (far / 0.2) ** 2, 0, None)[:, None] * [0, 0, 1], faces


def torn(vertices, faces):
    return vertices, faces[np.random.default_rng(0).random(len(faces)) > 0.05]


def holed(vertices, faces):
    """Without the faces near a point of the front."""
    return vertices, faces[np.linalg.norm(vertices[faces].mean(1) - [0, 0, 0.5], axis=1) > 0.15]


def inside_out(vertices, faces):
    return vertices, faces[:, ::-1]


@pytest.fixture(scope="module")
def cups():
    """Name of a cup, hard or soft -> the surface's vertices and faces, and the scene's views.

    A soft cup's edge is as wide as that of a trained scene.
    """
    made = {}
    for name, density in {"hard": solid(CUP), "soft": lambda p: 100 * torch.sigmoid((CUP(p) - 0.02) / 0.01)}.items():
        scene = source(density)
        skin = extract(scene, MeshConfig(resolution=64))
        made[name] = skin.vertices, skin.faces, scene.shape(checking_views(), PIXELS)
    return made


def scores(vertices, faces, seen):
    cameras, model = checking_views(), Model(vertices, faces, normals(vertices, faces))
    _, coverage = raster.render(model, cameras, PIXELS)
    return picture_scores(None, coverage, seen) | shape_scores(raster.surface(model, cameras, PIXELS), seen)


@pytest.mark.slow
@pytest.mark.parametrize("cup", ["hard", "soft"])
@pytest.mark.parametrize(
    ("spoil", "noticed"),
    [
        (good, set()),
        (lidded, {"depth", "dent"}),
        (cratered, {"dent"}),
        (torn, {"behind"}),
        (holed, {"behind"}),
        (inside_out, {"normals", "behind"}),
    ],
)
def test_wrong_shapes_are_noticed_and_good_ones_are_not(cups, cup, spoil, noticed):
    """Silhouettes alone would not notice them."""
    vertices, faces, seen = cups[cup]
    found = scores(*spoil(vertices, faces), seen)
    beyond = {key for key, bound in LEAST.items() if found[key] is not None and found[key] < bound}
    beyond |= {key for key, bound in MOST.items() if found[key] > bound}
    assert noticed <= beyond and "iou" not in beyond, found
    assert len(beyond_bounds(found)) == len(beyond) and bool(beyond) == bool(noticed), found


def test_softness_is_no_error_of_depth_and_a_slope_is():
    """Every depth is 0.1 more than the file's, or rises by 0.3 from left to right."""
    flat = raster.Surface(torch.full((1, 1, 36, 36), 2.0), torch.ones(1, 3, 36, 36), torch.zeros(1, 1, 36, 36) > 0)
    rgb, opacity = torch.ones(1, 3, 36, 36), torch.ones(1, 1, 36, 36)
    behind = shape_scores(flat, Seen(rgb, opacity, flat.distance + 0.1))
    assert behind["depth"] == pytest.approx(0, abs=1e-6) and behind["dent"] == pytest.approx(0, abs=1e-6)
    slope = torch.linspace(0, 0.3, 36).expand(1, 1, 36, 36)
    tilted = shape_scores(flat, Seen(rgb, opacity, flat.distance + slope))
    assert tilted["depth"] == pytest.approx(0.075, abs=0.005)
    assert tilted["dent"] == pytest.approx(0.15 - 0.3 * 2.5 / 36, abs=0.01)  # the middle of the outermost 5 columns
    assert tilted["normals"] is None and tilted["behind"] == 0.0  # the scene gives no normals


def test_a_rendered_ball_has_its_distances_normals_and_front():
    import trimesh

    mesh, cameras = trimesh.creation.icosphere(5, 0.5), orbit(3, elevation=20.0)
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    shape = raster.surface(Model(vertices, faces, vertices / 0.5), cameras, 64)
    origins, directions = cameras.rays(64)
    along = -(origins * directions).sum(-1)
    inside = 0.45**2 - (origins + along[..., None] * directions).square().sum(-1)  # not the rim
    distance = along - (inside.clamp(min=0) + 0.5**2 - 0.45**2).sqrt()
    here = inside > 0
    torch.testing.assert_close(shape.distance[:, 0][here], distance[here], atol=2e-3, rtol=0)
    normal = (origins + distance[..., None] * directions)[here] / 0.5
    assert (shape.normal.permute(0, 2, 3, 1)[here] * normal).sum(-1).min() > 0.999
    assert not shape.behind.any() and (shape.distance > 0).sum() > 1000
    turned = raster.surface(Model(vertices, faces[:, ::-1], vertices / 0.5), cameras, 64)
    assert torch.equal(turned.behind, turned.distance > 0)


@pytest.mark.slow
def test_an_export_warns_of_a_lid(tmp_path):
    """The surface is that of a cup with a lid, the views those of one without."""
    cup, closed = source(solid(CUP), plain()), source(solid(LIDDED), plain())
    settings = MeshConfig(resolution=64, level=150.0, colours="vertex")
    wrong = Export(dataclasses.replace(closed, view=cup.view, shape=cup.shape), settings)
    report = wrong.write(tmp_path / "mesh.glb")
    assert report["iou"] > 0.97 and report["depth"] > MOST["depth"] and report["dent"] > MOST["dent"]
    (warning,) = wrong.shortfalls()
    assert "mesh.glb differs from its scene: depth error 0." in warning and "dent 0." in warning
    assert "(at most 0.12 is usual)" in warning and f"warning: {warning}" in wrong.lines()
    assert wrong.whole()["files"]["mesh.glb"]["dent"] == report["dent"]
    right = Export(cup, settings)
    right.write(tmp_path / "mesh.glb")
    assert right.shortfalls() == [] and "normals 0.9" in right.lines()[0]


def test_a_scene_without_depths_is_checked_by_its_pictures(tmp_path):
    scene = dataclasses.replace(source(solid(ball(radius=0.6))), shape=None)
    one = Export(scene, MeshConfig(resolution=48, level=150.0, colours="vertex"))
    report = one.write(tmp_path / "mesh.glb")
    assert report["iou"] > 0.97 and report["depth"] is report["dent"] is report["normals"] is None
    assert report["behind"] == 0.0 and one.shortfalls() == [] and "depth" not in one.lines()[0]
