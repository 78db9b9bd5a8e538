"""Mesh files: what is in them, who can read them, how they stand, and that they are whole or not there."""

import json
import os
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from solids import BLUE, RED, TWELVE, block, plain, solid, source, union

from sds3d.export import formats, texture
from sds3d.export.exporter import Export
from sds3d.export.formats import FORMATS, read, write
from sds3d.export.mesh import extract
from sds3d.export.model import STANDS, Model, Placement, Stand, stand
from sds3d.export.settings import MeshConfig

WEB = Path(__file__).parent / "web"
MESHES = pytest.mark.parametrize("suffix", FORMATS)


def glb_tree(path):
    data = path.read_bytes()
    magic, version, total, length, kind = struct.unpack_from("<4sIIII", data)
    assert (magic, version, total, kind) == (b"glTF", 2, len(data), 0x4E4F534A)
    return json.loads(data[20 : 20 + length])


@pytest.fixture(scope="module")
def nosed():
    """A blue cube with a red nose on +z and a green lump on +x: every axis is told apart."""
    shape = union(
        block((-0.4, -0.4, -0.4), (0.4, 0.4, 0.4)),
        block((-0.1, 0.1, 0.3), (0.1, 0.3, 0.8)),
        block((0.3, -0.3, -0.1), (0.55, -0.1, 0.1)),
    )

    def paint(points):
        nose, lump = (points[:, 2:] > 0.45).float(), (points[:, :1] > 0.45).float()
        rest = 1 - nose - lump
        return nose * torch.tensor(RED) + lump * torch.tensor([0.1, 0.7, 0.1]) + rest * torch.tensor(BLUE)

    scene = source(solid(shape, edge=0.01), paint)
    return scene, extract(scene, MeshConfig(resolution=64, level=30.0))


@pytest.fixture(scope="module")
def models(nosed):
    scene, skin = nosed
    return {"texture": texture.with_texture(skin, scene, 256), "vertex": texture.with_vertex_colours(skin, scene)}


def shown(model):
    """Colours (V, 3) in [0, 1] at a model's vertices."""
    from sds3d.export.raster import bilinear

    if model.texture is None:
        return model.colours / 255
    picture = torch.from_numpy(model.texture.astype(np.float32)) / 255
    return bilinear(picture, torch.from_numpy(model.uv.astype(np.float32))).numpy()


@MESHES
@pytest.mark.parametrize("colours", ["texture", "vertex"])
def test_files_keep_axes_faces_and_colours(models, tmp_path, suffix, colours):
    if colours == "texture" and suffix in (".ply", ".stl"):
        pytest.skip("has no room for a texture")
    model = models[colours]
    files = write(model, tmp_path / f"mesh{suffix}")
    again = read(files[0])
    assert len(again.faces) == len(model.faces)
    corners, expected = (np.sort(m.vertices[m.faces].reshape(-1, 9).round(4), axis=0) for m in (again, model))
    np.testing.assert_allclose(corners, expected, atol=2e-4)
    a, b, c = (again.vertices[again.faces[:, i]] for i in range(3))
    true = (
        model.vertices[model.faces[:, 0]] * np.cross(*(model.vertices[model.faces[:, i]] for i in (1, 2)))
    ).sum() / 6
    assert (a * np.cross(b, c)).sum() / 6 == pytest.approx(true, rel=1e-3)  # wound as before
    v = again.vertices
    assert v[v[:, 2] > 0.6, 1].mean() == pytest.approx(0.2, abs=0.05)  # the nose sits high: y is up
    assert sorted(tmp_path.iterdir()) == sorted(files)  # nothing temporary is left
    if suffix == ".stl":
        return
    rgb = shown(again)
    np.testing.assert_allclose(rgb[v[:, 2] > 0.6].mean(0), RED, atol=0.03)
    np.testing.assert_allclose(rgb[v[:, 0] > 0.5].mean(0), [0.1, 0.7, 0.1], atol=0.03)
    np.testing.assert_allclose(rgb[v[:, 2] < -0.35].mean(0), BLUE, atol=0.03)


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply"])
@pytest.mark.parametrize("colours", ["texture", "vertex"])
def test_files_keep_normals(models, tmp_path, suffix, colours):
    """Those that were written, which need not be what a reader would make of the faces."""
    if colours == "texture" and suffix == ".ply":
        pytest.skip("has no room for a texture")
    model = models[colours]
    turned = np.random.default_rng(0).normal(size=model.normals.shape)
    turned /= np.linalg.norm(turned, axis=1, keepdims=True)
    again = read(write(replace(model, normals=turned), tmp_path / f"mesh{suffix}")[0])
    np.testing.assert_allclose(again.vertices[again.faces], model.vertices[model.faces], atol=1e-5)
    np.testing.assert_allclose(again.normals[again.faces], turned[model.faces], atol=1e-5)


def test_an_obj_names_its_two_neighbours(models, tmp_path):
    files = write(models["texture"], tmp_path / "my mug.obj")
    assert [f.name for f in files] == ["my mug.obj", "my mug.mtl", "my mug-texture.png"]
    assert "mtllib my mug.mtl" in files[0].read_text() and "map_Kd my mug-texture.png" in files[1].read_text()


def test_glb_says_how_it_wants_to_be_shown(models, tmp_path):
    """Matt, no metal, unlit where the colours hold light; linear vertex colours; no transform that turns the asset."""
    for colours, model in models.items():
        tree = glb_tree(write(model, tmp_path / f"{colours}.glb")[0])
        (material,) = tree["materials"]
        matt = material["pbrMetallicRoughness"]
        assert (matt["metallicFactor"], matt["roughnessFactor"]) == (0, 1)
        assert material["extensions"] == {"KHR_materials_unlit": {}} and "KHR_materials_unlit" in tree["extensionsUsed"]
        primitive = tree["meshes"][0]["primitives"][0]
        assert {"POSITION", "NORMAL"} <= set(primitive["attributes"]) and primitive["material"] == 0
        assert ("baseColorTexture" in matt) == (colours == "texture")
        identity = np.eye(4).ravel().tolist()
        assert all(node.get("matrix", identity) == identity and "rotation" not in node for node in tree["nodes"])
    lit = glb_tree(write(model, tmp_path / "lit.glb", unlit=False)[0])
    assert "extensions" not in lit["materials"][0] and "extensionsUsed" not in lit
    import trimesh

    raw = trimesh.load(tmp_path / "vertex.glb", process=False, force="mesh", skip_materials=True)
    nose = raw.visual.vertex_colors[models["vertex"].vertices[:, 2] > 0.6][:, 0].mean() / 255
    assert nose == pytest.approx(((0.9 + 0.055) / 1.055) ** 2.4, abs=0.02)


def test_the_two_colour_curves_are_inverse_and_known():
    x = np.linspace(0, 1, 101)
    np.testing.assert_allclose(formats._to_srgb(formats._to_linear(x)), x, atol=1e-6)
    assert formats._to_linear(np.array(0.5)) == pytest.approx(0.21404, abs=1e-5)


def test_a_placement_stands_a_model_on_the_ground_and_can_be_undone(models):
    model = models["vertex"]
    place = Placement.standing(model.vertices)
    there = place.to_file(model).vertices
    low, high = there.min(0), there.max(0)
    assert low[1] == pytest.approx(0) and high[1] == pytest.approx(1)
    assert low[0] == pytest.approx(-high[0]) and low[2] == pytest.approx(-high[2])
    assert there[there[:, 2] > high[2] - 0.1][:, 1].mean() > 0.6  # the nose still looks along +z, above the middle
    np.testing.assert_allclose(place.to_world(place.to_file(model)).vertices, model.vertices, atol=1e-12)


@pytest.mark.parametrize("stands", [Stand("y", "m", 2.0), Stand("z", "mm", 80.0)])
def test_a_placement_turns_what_stands_in_z_and_can_be_undone(models, stands):
    model = models["vertex"]
    place = Placement.standing(model.vertices, stands)
    there = place.to_file(model)
    low, high = there.vertices.min(0), there.vertices.max(0)
    up = "xyz".index(stands.up)
    assert low[up] == pytest.approx(0) and high[up] == pytest.approx(stands.height)
    nose = there.vertices[model.vertices[:, 2] > 0.6].mean(0)  # which is on the front, above the middle
    assert nose[up] > 0.6 * stands.height and (nose[2] > 0.3 if stands.up == "y" else nose[1] < -0.3)
    lump = there.vertices[model.vertices[:, 0] > 0.5].mean(0)
    assert lump[0] > 0.3 * stands.height  # not mirrored
    np.testing.assert_allclose(np.cross(*there.normals[:2]), place._rotated(np.cross(*model.normals[:2])[None], 1)[0])
    back = place.to_world(there)
    np.testing.assert_allclose(back.vertices, model.vertices, atol=1e-12)
    np.testing.assert_allclose(back.normals, model.normals, atol=1e-12)


@pytest.fixture(scope="module")
def exporter(nosed):
    return Export(nosed[0], MeshConfig(resolution=64, texture=256))


@pytest.mark.slow
@MESHES
@pytest.mark.parametrize(("up", "height"), [(None, None), ("y", 0.3), ("z", 70.0)])
def test_files_stand_as_programs_expect_them(exporter, tmp_path, suffix, up, height):
    """And are checked as they stand; what the report says undoes it."""
    path, one = tmp_path / f"mesh{suffix}", exporter
    one.up, one.height = up, height
    if (suffix, up) == (".glb", "z"):
        with pytest.raises(ValueError, match="up is 'z', and a GLB has y up by its standard"):
            one.write(path)
        return
    report = one.write(path)
    usual = {".glb": ("y", "m", 1), ".obj": ("y", "m", 1), ".ply": ("z", "m", 1), ".stl": ("z", "mm", 100)}[suffix]
    axis, unit, high = up or usual[0], usual[1], height or usual[2]
    assert (report["up"], report["unit"]) == (axis, unit) and report["iou"] > 0.97
    assert suffix == ".stl" or report["psnr"] > 22
    written = read(path)
    vertices = written.vertices
    standing = vertices[:, "xyz".index(axis)]
    assert standing.min() == pytest.approx(0, abs=1e-5 * high) and standing.max() == pytest.approx(high, rel=1e-5)
    front = vertices[:, 2] if axis == "y" else -vertices[:, 1]
    assert standing[front > 0.95 * front.max()].mean() > 0.6 * high  # the nose
    again = Placement(report["scale"], tuple(report["origin"]), report["up"]).to_world(written)
    np.testing.assert_allclose(again.vertices.max(0), one.skin().vertices.max(0), atol=1e-5)
    assert one.whole()["files"][path.name]["scale"] == report["scale"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"up": "x"}, "up is 'x'; give y or z"),
        ({"height": 0.0}, "height is 0.0; give 0.001 to 1000000, in mm for STL"),
        ({"height": 1e300}, "height is 1e\\+300; give 0.001"),
        ({"height": float("nan")}, "height is nan"),
        ({"height": float("inf")}, "height is inf"),
    ],
)
def test_a_stand_that_cannot_be_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        stand(".stl", **given)
    assert set(STANDS) == set(FORMATS)


def exported(scene, path, **settings):
    one = Export(scene, MeshConfig(resolution=64, texture=256, **settings), {"prompt": 'a "mug"\u2615'})
    return one, one.write(path)


@pytest.mark.slow
def test_a_file_is_checked_and_tells_all(nosed, tmp_path):
    one, report = exported(nosed[0], tmp_path / "mesh.glb")
    assert report["iou"] > 0.97 and report["psnr"] > 22 and report["watertight"] and report["components"] == 1
    assert one.shortfalls() == []
    tree = glb_tree(tmp_path / "mesh.glb")
    assert tree["asset"]["extras"] == tree["scenes"][0]["extras"] == {"prompt": 'a "mug"\u2615', "mesh": report}
    assert report["vertices"] == report["faces"] / 2 + 2  # Euler's formula, of a body without holes
    again = Placement(report["scale"], tuple(report["origin"])).to_world(read(tmp_path / "mesh.glb"))
    np.testing.assert_allclose(again.vertices.max(0), one.skin().vertices.max(0), atol=1e-5)  # undone
    assert {"surface", "texture", "views", "check", "files"} <= set(one.seconds)
    plain_file = one.write(tmp_path / "mesh.stl")
    assert plain_file["psnr"] is None and plain_file["iou"] == pytest.approx(report["iou"], abs=0.003)
    assert "mesh.glb: " in one.lines()[0] and one.lines()[-1].startswith("seconds: surface")


@pytest.mark.slow
def test_a_file_that_does_not_look_like_its_scene_is_reported(nosed, tmp_path, monkeypatch):
    """A level far from the right one makes a ball of half the width; a wrong colour spoils the pictures."""
    soft = source(lambda p: 12 * torch.exp(-(p**2).sum(-1) / 0.125), plain((0.1, 0.1, 0.1)))
    one, report = exported(soft, tmp_path / "small.glb", level=11.0)
    assert report["iou"] < 0.9
    assert "small.glb differs from its scene" in one.shortfalls()[0] and "IoU 0." in one.shortfalls()[0]
    monkeypatch.setattr(texture, "_dilated", lambda image, covered: 255 - image)
    _, wrong = exported(nosed[0], tmp_path / "wrong.glb")
    assert wrong["iou"] > 0.97 and wrong["psnr"] < 22 and wrong["psnr_covered"] < wrong["psnr"]


@MESHES
def test_bad_places_are_refused_and_old_files_stay(models, tmp_path, suffix):
    model = models["vertex" if suffix in (".ply", ".stl") else "texture"]
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="cannot write"):
        write(model, tmp_path / "file" / f"mesh{suffix}")
    with pytest.raises(ValueError, match=".glb or .obj or .ply or .stl"):
        write(model, tmp_path / "mesh.fbx")


@MESHES
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interruption_leaves_no_half_file(models, tmp_path, monkeypatch, suffix, error):
    """Whichever of the files is the one that cannot be written, what was there stays."""
    model = models["vertex" if suffix in (".ply", ".stl") else "texture"]
    before = [tmp_path / f"mesh{s}" for s in (suffix, ".mtl", "-texture.png")]
    for path in before:
        path.write_bytes(b"old")
    real, count = Path.write_bytes, 3 if suffix == ".obj" else 1
    for failing in range(count):
        written = []

        def breaks(self, data, failing=failing, written=written):
            written.append(self)
            if len(written) > failing:
                real(self, data[: len(data) // 2])
                raise error
            return real(self, data)

        monkeypatch.setattr(Path, "write_bytes", breaks)
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ValueError):
            write(model, before[0])
        assert sorted(tmp_path.iterdir()) == sorted(before)
        assert all(path.read_bytes() == b"old" for path in before)


def test_a_failing_check_leaves_no_file(models, tmp_path):
    def check(path):
        raise ValueError("cannot look")

    for suffix in (".glb", ".obj"):
        with pytest.raises(ValueError, match="cannot look"):
            write(models["texture"], tmp_path / f"mesh{suffix}", check)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(models, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot write .*mesh.glb: Permission denied"):
        write(models["texture"], tmp_path / "mesh.glb")


def test_damaged_and_missing_files_are_named(tmp_path):
    (tmp_path / "old.glb").write_bytes(b"old")
    with pytest.raises(ValueError, match="no mesh file"):
        read(tmp_path / "missing.glb")
    with pytest.raises(ValueError, match="damaged"):
        read(tmp_path / "old.glb")


@pytest.fixture(scope="module")
def validator():
    """Path of a GLB -> what Khronos' own validator says of it."""
    if shutil.which("node") is None or not (WEB / "node_modules" / "gltf-validator").is_dir():
        pytest.skip("the glTF validator is not installed: npm ci --prefix tests/web, as .ci/run does")

    def validate(paths):
        done = subprocess.run(["node", "validate.js", *map(str, paths)], cwd=WEB, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return validate


@pytest.mark.slow
def test_the_khronos_validator_finds_nothing_in_twelve_scenes(validator, tmp_path):
    """Zero errors and zero warnings, and no information but that of extras and of unused parts."""
    paths = []
    for i, (name, (shape, colour)) in enumerate(TWELVE.items()):
        colours = "vertex" if i % 4 == 3 else "texture"
        settings = MeshConfig(resolution=40, level=100.0, colours=colours, texture=128)
        one = Export(source(solid(shape), colour), settings, {"prompt": name}, i % 3 > 0)
        paths.append(tmp_path / f"{i}.glb")
        one.write(paths[-1])
    for path, report in zip(paths, validator(paths), strict=True):
        issues = report["issues"]
        assert issues["numErrors"] == issues["numWarnings"] == 0, (path, issues["messages"][:5])
        assert report["info"]["totalTriangleCount"] > 100
    broken = Model(**{**vars(read(paths[0])), "normals": read(paths[0]).normals * 2})
    write(broken, tmp_path / "broken.glb")
    data = (tmp_path / "broken.glb").read_bytes()
    (tmp_path / "broken.glb").write_bytes(data.replace(b'"metallicFactor":0.0', b'"metallicFactor":9.0'))
    assert validator([tmp_path / "broken.glb"])[0]["issues"]["numErrors"] > 0  # it does look
