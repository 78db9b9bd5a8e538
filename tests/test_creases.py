"""Normals at creases: flat faces are shaded flat, round ones round, and nothing else of a mesh changes."""

import numpy as np
import pytest
from solids import block, solid, source

from sds3d.export import formats
from sds3d.export.creases import CREASE, with_creases
from sds3d.export.exporter import Export
from sds3d.export.mesh import normals
from sds3d.export.model import Model
from sds3d.export.settings import MeshConfig


def welded(mesh, **more):
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    return Model(vertices, faces, normals(vertices, faces), **more)


def face_normals(model):
    a, b, c = (model.vertices[model.faces[:, i]] for i in range(3))
    turned = np.cross(b - a, c - a)
    return turned / np.linalg.norm(turned, axis=1, keepdims=True).clip(1e-20)


def test_a_cube_is_flat_up_to_its_edges():
    import trimesh

    model = welded(trimesh.creation.box((1, 1, 1)).subdivide().subdivide())
    split = with_creases(model)
    assert np.array_equal(split.vertices[split.faces], model.vertices[model.faces])
    np.testing.assert_allclose(split.normals[split.faces], face_normals(model)[:, None].repeat(3, 1), atol=1e-12)
    assert len(split.vertices) == 6 * 25 and len(model.vertices) == 98  # 5 x 5 vertices on each side


@pytest.mark.parametrize("turn", [CREASE - 1, CREASE + 1])
def test_a_crease_is_where_faces_turn_by_more_than_the_bound(turn):
    """Two squares that meet at an angle: with a crease there are 8 vertices, else 6."""
    angle = np.radians(turn)
    bent = [-np.sin(angle), np.cos(angle)]
    vertices = np.array([[x, y, z] for x in (0.0, 1.0) for y, z in ((1.0, 0.0), (0.0, 0.0), bent[::-1])])
    vertices[[2, 5], 1:] = -np.cos(angle), -np.sin(angle)
    faces = np.array([[0, 1, 4], [0, 4, 3], [1, 2, 5], [1, 5, 4]])
    model = Model(vertices, faces, normals(vertices, faces))
    split = with_creases(model)
    assert len(split.vertices) == (8 if turn > CREASE else 6)
    sharp = (split.normals[split.faces] * face_normals(model)[:, None]).sum(-1).min()
    assert sharp > 0.9999 if turn > CREASE else 0.9 < sharp < 0.99  # halfway between, or nearly, as areas have it


def test_a_ball_stays_round_and_whole_also_across_a_seam_of_its_texture():
    import trimesh

    model = welded(trimesh.creation.icosphere(3, 0.5))
    split = with_creases(model)
    assert len(split.vertices) == len(model.vertices) and (split.normals * split.vertices * 2).sum(1).min() > 0.999
    right = model.vertices[model.faces].mean(1)[:, 0] > 0  # of these faces, every corner is a vertex of its own
    faces = model.faces.copy()
    faces[right] = len(model.vertices) + np.arange(3 * right.sum()).reshape(-1, 3)
    vertices = np.concatenate([model.vertices, model.vertices[model.faces[right]].reshape(-1, 3)])
    uv, colours = np.abs(vertices[:, :2]), (255 * np.abs(vertices)).astype(np.uint8)
    seams = Model(vertices, faces, normals(vertices, faces), colours, uv)
    smooth = with_creases(seams)
    np.testing.assert_allclose(smooth.normals[smooth.faces], split.normals[split.faces], atol=1e-12)
    for name in ("vertices", "uv", "colours"):
        assert np.array_equal(getattr(smooth, name)[smooth.faces], getattr(seams, name)[seams.faces])


def test_faces_without_area_and_edges_of_three_faces_have_normals():
    vertices = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, -1, 0]])
    faces = np.array([[0, 1, 2], [0, 1, 3], [1, 0, 4], [0, 0, 1], [2, 2, 2]])
    split = with_creases(Model(vertices, faces, np.zeros_like(vertices)))
    assert len(split.faces) == 5
    np.testing.assert_allclose(np.linalg.norm(split.normals, axis=1), 1)


@pytest.fixture(scope="module")
def cube():
    scene = source(solid(block((-0.5,) * 3, (0.5,) * 3), edge=0.01))
    return Export(scene, MeshConfig(resolution=64, level=150.0, texture=128))


@pytest.mark.parametrize("suffix", [".glb", ".obj"])
def test_an_exported_cube_has_flat_sides(cube, tmp_path, suffix):
    """Of the faces that lie within 8 degrees of a side, nearly all have its normal; by area alone 86 % had."""
    cube.write(tmp_path / f"mesh{suffix}")
    model = formats.read(tmp_path / f"mesh{suffix}")
    assert len(model.faces) == len(cube.skin().faces)
    side = face_normals(model).round()  # no unit vector if the face is part of a bevel
    flat = (side * face_normals(model)).sum(1) > np.cos(np.radians(8))
    cosine = (model.normals[model.faces[flat]] * side[flat][:, None]).sum(-1).min(1)
    assert flat.mean() > 0.8 and (cosine > np.cos(np.radians(5))).mean() > 0.97


def test_a_ply_keeps_a_closed_surface(cube, tmp_path):
    """Programs print and sculpt it."""
    import trimesh

    cube.write(tmp_path / "mesh.ply")
    mesh = trimesh.load_mesh(tmp_path / "mesh.ply", process=False)
    assert mesh.is_watertight and len(mesh.vertices) == len(cube.skin().vertices)
