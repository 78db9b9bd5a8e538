"""Meshes, videos and sheets against shapes whose answers are known."""

import json
import math
import struct

import numpy as np
import pytest
import torch

from sds3d.export import mesh as meshes
from sds3d.export.mesh import extract, load, save
from sds3d.export.sheet import contact_sheet, preview, resize, side_by_side
from sds3d.export.video import turntable

RED, BLUE = (0.9, 0.1, 0.2), (0.1, 0.2, 0.8)


def solid(inside, edge=0.01):
    """A density of 300 where ``inside(points)`` is positive: 300 / (1 + exp(-inside / edge))."""
    return lambda points: 300 * torch.sigmoid(inside(points) / edge)


def ball(centre=(0.0, 0.0, 0.0), radius=0.5):
    return lambda points: radius - (points - torch.tensor(centre)).norm(dim=-1)


def block(low, high):
    low, high = torch.tensor(low), torch.tensor(high)
    return lambda points: torch.minimum(points - low, high - points).min(-1).values


def union(*parts):
    return lambda points: torch.stack([part(points) for part in parts]).max(0).values


def plain(colour=RED):
    return lambda points: torch.tensor(colour).expand(len(points), 3)


def glb_tree(path):
    data = path.read_bytes()
    length = struct.unpack_from("<I", data, 12)[0]
    return json.loads(data[20 : 20 + length])


def test_a_sphere_has_its_volume_and_its_area():
    mesh = extract(solid(ball(radius=0.6)), plain(), resolution=64, threshold=150.0)
    assert mesh.is_watertight and mesh.is_winding_consistent
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.01)
    assert mesh.area == pytest.approx(4 * math.pi * 0.6**2, rel=0.02)  # facets make it no smaller, steps no larger


def test_normals_point_outwards():
    mesh = extract(solid(ball()), plain(), resolution=32)
    assert mesh.volume > 0
    assert ((mesh.face_normals * mesh.triangles_center).sum(1) > 0).all()
    radial = mesh.vertices / np.linalg.norm(mesh.vertices, axis=1, keepdims=True)
    assert (mesh.vertex_normals * radial).sum(1).min() > 0.9


def test_a_box_lands_where_it_is():
    mesh = extract(solid(block((-0.7, -0.2, 0.1), (0.3, 0.9, 0.5))), plain(), resolution=80, threshold=150.0)
    np.testing.assert_allclose(mesh.bounds, [[-0.7, -0.2, 0.1], [0.3, 0.9, 0.5]], atol=0.025)  # one voxel
    assert mesh.volume == pytest.approx(1.0 * 1.1 * 0.4, rel=0.03)


def test_what_touches_the_box_is_closed_there():
    mesh = extract(solid(block((-2.0, -0.5, -0.5), (2.0, 0.5, 0.5))), plain(), resolution=40)
    assert mesh.is_watertight
    assert np.abs(mesh.vertices).max() <= 1.0
    assert mesh.extents[0] > 1.9


def test_another_box_scales_the_mesh():
    mesh = extract(solid(ball(radius=1.5)), plain(), resolution=48, box=2.0)
    np.testing.assert_allclose(mesh.extents, 3.0, atol=0.15)


def test_specks_and_cavities_are_dropped():
    speck, hollow = ball((0.8, 0.8, 0.8), 0.1), lambda p: torch.minimum(ball(radius=0.6)(p), -ball(radius=0.3)(p))
    field = solid(union(hollow, speck))
    kept = extract(field, plain(), resolution=48, keep=0.05, threshold=150.0)
    assert kept.volume == pytest.approx(4 / 3 * math.pi * 0.6**3, rel=0.02)  # no hole, no speck
    everything = extract(field, plain(), resolution=48, keep=0.0, threshold=150.0)
    assert everything.volume == pytest.approx(4 / 3 * math.pi * (0.6**3 + 0.1**3), rel=0.02)
    two = solid(union(ball((-0.5, 0, 0), 0.35), ball((0.5, 0, 0), 0.3)))
    assert extract(two, plain(), resolution=48).body_count == 2
    assert extract(two, plain(), resolution=48, keep=1.0).body_count == 1


def test_the_default_threshold_keeps_the_outline_of_a_soft_ball():
    """Density A exp(-r^2 / 2 w^2): a ray that passes at r has optical depth A w sqrt(2 pi) exp(-r^2 / 2 w^2), so it
    lets half the light through at r^2 = 2 w^2 ln(A w sqrt(2 pi) / ln 2), whatever a threshold tuned to hard scenes
    would make of a peak density of 12."""
    peak, width = 12.0, 0.25
    mesh = extract(lambda p: peak * torch.exp(-(p**2).sum(-1) / (2 * width**2)), plain(), resolution=64)
    radius = math.sqrt(2 * width**2 * math.log(peak * width * math.sqrt(2 * math.pi) / math.log(2)))
    # Perspective moves the outline by less than r / 60; the bisection and 48 pixels leave about a voxel, 0.03.
    np.testing.assert_allclose(np.linalg.norm(mesh.vertices, axis=1), radius, atol=0.03)


@pytest.mark.parametrize("fog", [0.0, 0.5])
def test_the_default_threshold_keeps_a_hard_cup_hollow(fog):
    """A cup of density 60, with and without fog in it that no view shows; its walls lie midway between corners."""
    voxel = 1 / 32
    outer = block((-15.5 * voxel,) * 3, (15.5 * voxel,) * 3)
    inner = block((-11.5 * voxel, -9.5 * voxel, -11.5 * voxel), (11.5 * voxel, 1.0, 11.5 * voxel))
    mesh = extract(lambda p: torch.where(inner(p) > 0, fog, 60.0) * (outer(p) > 0), plain(), resolution=64)
    np.testing.assert_allclose(mesh.extents, 31 * voxel, atol=0.5 * voxel)
    assert mesh.volume == pytest.approx((31**3 - 23**2 * 25) * voxel**3, rel=0.05)


def test_a_scene_of_nearly_clear_matter_is_still_meshed():
    """Peak density 2: a ray through the middle of the ball loses 86 % of its light, one at 0.47 of 0.5 half."""
    mesh = extract(lambda points: 2 * torch.sigmoid(ball()(points) / 0.01), plain(), resolution=48)
    np.testing.assert_allclose(mesh.extents, 0.94, atol=0.08)


def test_colours_come_from_where_a_camera_looks():
    """A shell of paint 0.1 thick outside is seen; the core is not, and neither is the colour of empty space."""

    def painted(points):
        radius = points.norm(dim=-1, keepdim=True)
        core, paint, air = torch.tensor([0.0, 1.0, 0.0]), torch.tensor(BLUE), torch.tensor([1.0, 1.0, 0.0])
        return torch.where(radius < 0.4, core, torch.where(radius < 0.515, paint, air))

    mesh = extract(solid(ball(radius=0.5), edge=0.003), painted, resolution=64)
    assert np.abs(mesh.visual.vertex_colors[:, :3] / 255 - np.array(BLUE)).max() < 0.05
    assert (mesh.visual.vertex_colors[:, 3] == 255).all()


@pytest.fixture(scope="module")
def nosed():
    """A blue cube with a red nose on +z and a small green lump on +x: every axis is told apart."""
    shape = union(
        block((-0.4, -0.4, -0.4), (0.4, 0.4, 0.4)),
        block((-0.1, 0.1, 0.3), (0.1, 0.3, 0.8)),
        block((0.3, -0.3, -0.1), (0.55, -0.1, 0.1)),
    )

    def paint(points):
        nose, lump = (points[:, 2:] > 0.45).float(), (points[:, :1] > 0.45).float()
        rest = 1 - nose - lump
        return nose * torch.tensor(RED) + lump * torch.tensor([0.1, 0.7, 0.1]) + rest * torch.tensor(BLUE)

    return extract(solid(shape), paint, resolution=64)


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply"])
def test_files_keep_axes_faces_and_colours(nosed, tmp_path, suffix):
    again = load(save(nosed, tmp_path / f"mesh{suffix}"))
    np.testing.assert_allclose(again.bounds, nosed.bounds, atol=1e-4)
    assert again.volume == pytest.approx(nosed.volume, rel=1e-3) and again.is_watertight
    rgb = again.visual.vertex_colors[:, :3] / 255
    v = again.vertices
    np.testing.assert_allclose(rgb[v[:, 2] > 0.6].mean(0), RED, atol=0.03)
    np.testing.assert_allclose(rgb[v[:, 0] > 0.5].mean(0), [0.1, 0.7, 0.1], atol=0.03)
    np.testing.assert_allclose(rgb[v[:, 2] < -0.35].mean(0), BLUE, atol=0.03)
    assert v[v[:, 2] > 0.6, 1].mean() == pytest.approx(0.2, abs=0.05)  # the nose sits high: y is up
    assert list(tmp_path.iterdir()) == [tmp_path / f"mesh{suffix}"]  # nothing temporary is left


def test_glb_is_lit_as_gltf_wants(nosed, tmp_path):
    """Linear COLOR_0, normals, and a material that is no metal; and no transform that turns the asset."""
    path = save(nosed, tmp_path / "mesh.glb")
    tree = glb_tree(path)
    primitive = tree["meshes"][0]["primitives"][0]
    assert {"POSITION", "NORMAL", "COLOR_0"} <= set(primitive["attributes"])
    assert tree["materials"][primitive["material"]]["pbrMetallicRoughness"]["metallicFactor"] == 0
    identity = np.eye(4).ravel().tolist()
    assert all(node.get("matrix", identity) == identity and "rotation" not in node for node in tree["nodes"])
    assert tree["accessors"][primitive["attributes"]["POSITION"]]["max"][2] == pytest.approx(0.8, abs=0.05)
    import trimesh

    raw = trimesh.load(path, process=False, force="mesh", skip_materials=True)
    nose = raw.visual.vertex_colors[raw.vertices[:, 2] > 0.6][:, 0].mean() / 255
    assert nose == pytest.approx(((0.9 + 0.055) / 1.055) ** 2.4, abs=0.02)


def test_the_two_colour_curves_are_inverse_and_known():
    x = np.linspace(0, 1, 101)
    np.testing.assert_allclose(meshes._to_srgb(meshes._to_linear(x)), x, atol=1e-6)
    assert meshes._to_linear(np.array(0.5)) == pytest.approx(0.21404, abs=1e-5)


def test_emptiness_is_told_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="at least 9.% of the light.*more steps"):
        extract(lambda points: torch.full((len(points),), 0.02), plain(), resolution=16)
    with pytest.raises(ValueError, match="threshold is 500.*lower threshold"):
        extract(solid(ball()), plain(), resolution=16, threshold=500.0)
    with pytest.raises(ValueError, match="not finite"):
        extract(lambda points: points[:, 0] * float("nan"), plain(), resolution=16)


@pytest.mark.parametrize("bad", [{"resolution": 4}, {"resolution": 5000}, {"keep": 2.0}, {"threshold": -1.0}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        extract(solid(ball()), plain(), **bad)


def test_bad_places_are_refused_and_old_files_stay(nosed, tmp_path):
    with pytest.raises(ValueError, match=".glb or .obj or .ply"):
        save(nosed, tmp_path / "mesh.stl")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="cannot write"):
        save(nosed, tmp_path / "file" / "mesh.glb")
    old = tmp_path / "old.glb"
    old.write_bytes(b"old")
    nosed_broken = nosed.copy()
    nosed_broken.export = lambda **_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with pytest.raises(ValueError, match="No space left"):
        save(nosed_broken, tmp_path / "old.ply")
    assert old.read_bytes() == b"old" and not (tmp_path / "old.ply").exists()
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="no mesh file"):
        load(tmp_path / "missing.glb")
    with pytest.raises(ValueError, match="damaged"):
        load(old)


def flat_view(cameras, size=32):
    """A picture that says where the camera stands: red is azimuth / 360, green is elevation / 90."""
    rgb = torch.stack([cameras.azimuth / 360, cameras.elevation / 90, torch.full_like(cameras.azimuth, 0.5)], -1)
    return rgb[:, :, None, None].expand(-1, 3, size, size)


def test_a_turntable_turns_once(tmp_path):
    import imageio_ffmpeg

    path = turntable(flat_view, tmp_path / "turn.mp4", frames=12, fps=24, size=64, elevation=45)
    reader = imageio_ffmpeg.read_frames(str(path))
    info = next(reader)
    frames = [np.frombuffer(frame, np.uint8).reshape(64, 64, 3) for frame in reader]
    assert info["size"] == (64, 64) and info["fps"] == 24 and info["codec"] == "h264" and len(frames) == 12
    red = [frame[..., 0].mean() / 255 for frame in frames]
    np.testing.assert_allclose(red, np.arange(12) / 12, atol=0.04)  # lossy, and YUV with a quarter of the colour
    assert frames[0][..., 1].mean() / 255 == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("bad", [{"size": 65}, {"frames": 1}, {"fps": 0}])
def test_impossible_turntables_are_refused(tmp_path, bad):
    with pytest.raises(ValueError):
        turntable(flat_view, tmp_path / "turn.mp4", **bad)
    with pytest.raises(ValueError, match=".mp4"):
        turntable(flat_view, tmp_path / "turn.avi")
    assert not list(tmp_path.iterdir())


def test_a_failing_render_leaves_no_video(tmp_path):
    def fails(cameras):
        raise ValueError("no scene")

    with pytest.raises(ValueError, match="no scene"):
        turntable(fails, tmp_path / "turn.mp4", frames=4, size=32)
    assert not list(tmp_path.iterdir())


def read(path):
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


def test_a_contact_sheet_puts_every_tile_in_its_place(tmp_path):
    first = torch.linspace(0, 1, 3)[:, None, None, None].expand(3, 3, 8, 8)
    second = torch.tensor([1.0, 0.0, 0.0])[None, :, None, None].expand(1, 3, 8, 8)
    sheet = read(contact_sheet([first, second], tmp_path / "sheet.png"))
    assert sheet.shape == (18, 28, 3)  # 8 + 2 + 8, 8 + 2 + 8 + 2 + 8
    assert (sheet[:8, :8] == 0).all() and (sheet[:8, 10:18] == 128).all() and (sheet[:8, 20:] == 255).all()
    assert (sheet[10:, :8] == [255, 0, 0]).all() and (sheet[10:, 8:] == 255).all()
    assert (sheet[8:10] == 255).all()


def test_labels_make_room_for_themselves(tmp_path):
    images = torch.full((1, 3, 64, 64), 0.5)
    sheet = read(contact_sheet([images, images], tmp_path / "sheet.png", labels=["truth", "ours"]))
    assert sheet.shape == (2 * (14 + 64) + 2, 64, 3)
    assert sheet[:14].min() < 128 and (sheet[14:78] == 128).all()  # ink above, the image untouched
    with pytest.raises(ValueError, match="2 rows got 1 labels"):
        contact_sheet([images, images], tmp_path / "other.png", labels=["truth"])
    with pytest.raises(ValueError, match="at least one row"):
        contact_sheet([], tmp_path / "other.png")


def test_preview_goes_round_from_the_front(tmp_path):
    sheet = read(preview(flat_view, tmp_path / "preview.png", views=4, size=16))
    assert sheet.shape == (16, 4 * 18 - 2, 3)
    np.testing.assert_allclose(sheet[8, 8::18, 0] / 255, [0, 0.25, 0.5, 0.75], atol=0.01)


def test_side_by_side_alternates(tmp_path):
    truth, ours = torch.zeros(5, 3, 8, 8), torch.ones(5, 3, 8, 8) * 0.5
    sheet = read(side_by_side(truth, ours, tmp_path / "pairs.png", columns=3, size=8))
    assert sheet.shape == (4 * (14 + 8) + 3 * 2, 3 * 10 - 2, 3)
    assert (sheet[14:22, :8] == 0).all() and (sheet[38:46, :8] == 128).all() and (sheet[62:70, :8] == 0).all()


def test_resizing_down_averages():
    board = (torch.arange(64) % 2).float().reshape(1, 1, 8, 8).expand(1, 3, 8, 8)
    torch.testing.assert_close(resize(board, 4), torch.full((1, 3, 4, 4), 0.5))
    assert resize(board, 32).shape == (1, 3, 32, 32) and resize(board, 32).max() <= 1
