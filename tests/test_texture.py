"""Colours of surfaces, the maps that hold them, and the renderer that looks at them."""

import numpy as np
import pytest
import torch
from solids import BLUE, RED, ball, block, halves, plain, solid, source

from sds3d.cameras import Cameras, orbit
from sds3d.evaluate.truth import masked_psnr, silhouette_iou
from sds3d.export import raster, texture
from sds3d.export.mesh import Skin, extract
from sds3d.export.model import Model
from sds3d.export.settings import MeshConfig


def sphere(radius=0.5):
    import trimesh

    mesh = trimesh.creation.icosphere(5, radius)
    vertices = np.asarray(mesh.vertices)
    return Model(vertices, np.asarray(mesh.faces), vertices / radius)


def test_a_ball_covers_its_disc():
    """A ray hits a ball whose centre it passes within its radius; 20,000 faces are nearly one."""
    cameras = orbit(5, elevation=25.0)
    origins, directions = cameras.rays(96)
    true = torch.linalg.cross(origins, directions).norm(dim=-1) < 0.5
    _, coverage = raster.render(sphere(), cameras, 96)
    assert (coverage[:, 0].bool() != true).float().mean() < 0.002
    assert torch.equal(raster.silhouettes(sphere().vertices, sphere().faces, cameras, 96), coverage[:, 0].bool())


def test_colours_are_linear_in_space_and_the_nearest_face_wins():
    """A floor that runs away from the camera, its colour its place on the way; a square stands before it."""
    floor = [[-1, -0.5, -1], [1, -0.5, -1], [1, -0.5, 1], [-1, -0.5, 1]]
    stood = [[-0.2, -0.4, 0.9], [0.2, -0.4, 0.9], [0.2, 0.4, 0.9], [-0.2, 0.4, 0.9]]
    grey = [0, 0, 255, 255]
    colours = np.array([[g, g, g] for g in grey] + [[255, 0, 0]] * 4, dtype=np.uint8)
    faces = np.array([[0, 2, 1], [0, 3, 2], [4, 5, 6], [4, 6, 7]])
    vertices = np.array(floor + stood, dtype=float)
    camera = Cameras(*(torch.tensor([v]) for v in (0.0, 20.0, 3.0, 40.0)))
    image, coverage = raster.render(Model(vertices, faces, np.zeros_like(vertices), colours), camera, 64)
    origins, directions = camera.rays(64)
    t = (-0.5 - origins[..., 1]) / directions[..., 1]
    place = origins + t[..., None] * directions
    on_floor = (t > 0) & (place[..., [0, 2]].abs().amax(-1) < 0.98)
    t = (0.9 - origins[..., 2]) / directions[..., 2]
    stand = origins + t[..., None] * directions
    before = (stand[..., 0].abs() < 0.19) & (stand[..., 1].abs() < 0.39)
    clear = on_floor & ~((stand[..., 0].abs() < 0.21) & (stand[..., 1].abs() < 0.41))
    assert clear.sum() > 200 and before.sum() > 100
    np.testing.assert_allclose(image[0, 1][clear[0]], (place[..., 2][clear] + 1) / 2, atol=1e-4)
    torch.testing.assert_close(image[0][:, before[0]].mean(1), torch.tensor([1.0, 0.0, 0.0]), atol=1e-5, rtol=0)
    assert coverage[0, 0][clear[0] | before[0]].all()


def test_many_large_faces_are_drawn_in_parts(monkeypatch):
    whole = raster.render(sphere(), orbit(2), 64)
    monkeypatch.setattr(raster, "PAIRS", 500)
    for a, b in zip(whole, raster.render(sphere(), orbit(2), 64)):
        assert torch.equal(a, b)


def test_textures_are_sampled_between_texels():
    board = torch.tensor([[0.0, 1.0], [0.5, 0.25]])[..., None]
    uv = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.5, 0.25], [0.5, 0.5], [0.0, 0.0], [1.0, 1.0]])
    expected = torch.tensor([0.0, 1.0, 0.5, 0.5, 0.4375, 0.0, 0.25])  # v goes down
    torch.testing.assert_close(raster.bilinear(board, uv)[:, 0], expected)


@pytest.fixture(scope="module")
def two_coloured():
    scene = source(solid(ball(radius=0.6)), halves())
    return scene, extract(scene, MeshConfig(resolution=48, level=150.0))


@pytest.mark.parametrize("colours", ["texture", "vertex"])
def test_a_two_coloured_ball_has_its_colours_on_the_right_sides(two_coloured, colours):
    """Seen from where x is positive it is red, from the other side blue."""
    scene, skin = two_coloured
    model = texture.with_vertex_colours(skin, scene)
    if colours == "texture":
        model = texture.with_texture(skin, scene, 256)
        assert model.texture.shape == (256, 256, 3) and model.colours is None
    sides = Cameras(*(torch.tensor(v) for v in ([90.0, 270.0], [0.0, 0.0], [3.0, 3.0], [40.0, 40.0])))
    images, coverage = raster.render(model, sides, 96)
    for image, covered, true in zip(images, coverage, (RED, BLUE)):
        inside = image[:, covered[0] > 0].T
        assert len(inside) > 1000
        wrong = (inside - torch.tensor(true)).abs().amax(-1) > 0.02
        assert wrong.float().mean() < 0.03  # the rim: texels that lie across the border
    front, covered = raster.render(model, orbit(1, elevation=0.0), 96)
    left, right = front[0, 0, :, :46][covered[0, 0, :, :46] > 0], front[0, 0, :, 50:][covered[0, 0, :, 50:] > 0]
    assert left.median() == pytest.approx(BLUE[0], abs=0.01) and right.median() == pytest.approx(RED[0], abs=0.01)


def test_a_texture_looks_like_its_scene(two_coloured):
    scene, skin = two_coloured
    cameras = orbit(4, elevation=20.0, start=10.0)
    true, opacity = scene.view(cameras, 96)
    images, coverage = raster.render(texture.with_texture(skin, scene, 256), cameras, 96)
    assert silhouette_iou(coverage, opacity).min() > 0.97
    assert masked_psnr(images, true, torch.minimum(coverage, opacity)).min() > 25


def test_the_map_is_one_to_one(two_coloured):
    """No texel belongs to two faces, and every face's corners are those of the surface."""
    _, skin = two_coloured
    model = texture.unwrapped(skin, 512)
    assert len(model.faces) == len(skin.faces) and model.uv.min() >= 0 and model.uv.max() <= 1
    ours = np.sort(model.vertices[model.faces].mean(1).round(6), axis=0)
    np.testing.assert_allclose(ours, np.sort(skin.vertices[skin.faces].mean(1).round(6), axis=0), atol=1e-5)
    place = torch.from_numpy(model.uv) * 512 - 0.5
    flat = torch.cat([place, torch.ones(len(place), 1)], -1)
    pixels = torch.cat([pixel for _, pixel, _ in raster._hits(flat, torch.from_numpy(model.faces), 512)])
    twice = len(pixels) - len(pixels.unique())
    assert len(pixels) > 0.4 * 512**2 and twice < 0.002 * len(pixels)  # a centre on an edge belongs to both faces


def test_no_seam_shows_where_the_map_ends():
    """Texels outside all charts have a colour of a chart: of one plain colour, the whole texture is that colour."""
    scene = source(solid(block((-0.4,) * 3, (0.4,) * 3)), plain((0.2, 0.4, 0.6)))
    model = texture.with_texture(extract(scene, MeshConfig(resolution=24, level=150.0)), scene, 128)
    assert np.abs(model.texture / 255 - [0.2, 0.4, 0.6]).max() < 0.003


def test_colours_come_from_where_a_camera_looks():
    """A shell of paint 0.1 thick outside is seen; the core is not, and neither is the colour of empty space."""

    def painted(points):
        radius = points.norm(dim=-1, keepdim=True)
        core, paint, air = torch.tensor([0.0, 1.0, 0.0]), torch.tensor(BLUE), torch.tensor([1.0, 1.0, 0.0])
        return torch.where(radius < 0.4, core, torch.where(radius < 0.515, paint, air))

    scene = source(solid(ball(radius=0.5)), painted)
    model = texture.with_vertex_colours(extract(scene, MeshConfig(resolution=64, level=150.0)), scene)
    assert np.abs(model.colours / 255 - np.array(BLUE)).max() < 0.05


def test_large_meshes_are_unwrapped_in_blocks():
    rng = np.random.default_rng(0)
    blocks = list(texture._blocks(rng.random((5000, 3)), np.arange(5000)))
    assert max(map(len, blocks)) <= texture.BLOCK
    assert np.array_equal(np.sort(np.concatenate(blocks)), np.arange(5000))


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="texture is 7; give 64 to 4096"):
        MeshConfig(texture=7)


def test_a_skin_without_area_has_no_crash():
    flat = Skin(np.zeros((3, 3)), np.array([[0, 1, 2]]), 1.0, None)
    model = texture.with_vertex_colours(flat, source(solid(ball())))
    assert model.colours.shape == (3, 3) and np.isfinite(model.normals).all()
