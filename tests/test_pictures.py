"""sds3d render: layers against hand-made renders, files read back by other programs."""

import re
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from sds3d.cameras import orbit
from sds3d.runs.scene import Asset
from sds3d.students.render_layers import layers, picture
from sds3d.students.scene.render import RenderOut


def test_depth_is_bright_where_it_is_near_and_normals_are_half_n_plus_half():
    opacity = torch.tensor([1.0, 1.0, 0.5, 0.0]).view(1, 1, 1, 4)
    depth = torch.tensor([2.2, 3.0, 3.8, 0.0]).view(1, 1, 1, 4)
    normal = torch.tensor([[0.0, 0.0, 0.8], [1.0, 0.0, 0.0], [0.0, -0.5, 0.0], [0.0, 0.0, 0.0]]).T.view(1, 3, 1, 4)
    out = RenderOut(torch.rand((1, 3, 1, 4), generator=torch.Generator().manual_seed(0)), opacity, depth, normal, None)
    shown = picture(out, "normals", torch.tensor([3.0]))[0, :, 0].T
    expected = [[0.5, 0.5, 1.0], [1.0, 0.5, 0.5], [0.75, 0.5, 0.75], [1.0, 1.0, 1.0]]  # the third on half white
    torch.testing.assert_close(shown, torch.tensor(expected))
    near, middle, far, empty = picture(out, "depth", torch.tensor([3.0]))[0, :, 0].T
    assert near.mean() > middle.mean() > (2 * far - 1).mean() and empty.tolist() == [1, 1, 1]
    torch.testing.assert_close(middle, torch.tensor([0.128, 0.567, 0.551]), atol=0.005, rtol=0)  # viridis at 0.5
    assert picture(out, "opacity", torch.tensor([3.0]))[0, :, 0, 2].tolist() == [0.5, 0.5, 0.5]
    assert picture(out, "rgb", torch.tensor([3.0])) is out.rgb


def test_layers_of_a_scene_are_of_one_view(made):
    scene = Asset.open(made).scene
    found = layers(scene, orbit(2), 16, ["normals", "opacity", "rgb", "depth"])
    assert list(found) == ["normals", "opacity", "rgb", "depth"]
    assert all(image.shape == (2, 3, 16, 16) and 0 <= image.min() and image.max() <= 1 for image in found.values())
    solid = found["opacity"][0, 0] > 0.9
    assert solid.any() and not solid.all()
    blue = 2 * found["normals"][0, 2][solid] - 1  # of what the front camera sees, nearly all faces the front
    assert (blue > 0).float().mean() > 0.9
    with pytest.raises(ValueError, match="no layer 'colour'; give one or more of rgb, opacity, depth, normals"):
        layers(scene, orbit(1), 16, ["colour"])


def test_render_writes_an_mp4_that_plays_everywhere(call, made):
    code, out, err = call("render", made, "--what", "rgb,depth", "--size", "34", "--frames", "5", "--fps", "12")
    assert code == 0, err
    path = Path(out.strip())
    assert path == Path(made) / "turntable-rgb-depth.mp4" and "turntable-rgb-depth.mp4 5/5  0 s left" in err
    said = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)], capture_output=True, text=True).stderr
    video = next(line for line in said.splitlines() if "Video:" in line)
    assert "h264" in video and re.search(r"yuv420p\b", video) and "68x34" in video and "12 fps" in video, video
    assert imageio_ffmpeg.count_frames_and_secs(str(path))[0] == 5
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # a browser need not load it all to begin


def test_render_writes_several_files_one_for_each_what_and_format(call, made, tmp_path):
    wanted = ["-w", "rgb", "-w", "opacity,normals", "-f", ".GIF, webp,png", "--size", "17", "--frames", "9"]
    code, out, err = call("render", made, *wanted, "-o", "there", "--quiet")
    assert code == 0 and not err
    names = [Path(line).name for line in out.splitlines()]
    assert names == [
        "turntable.gif", "turntable.webp", "sheet.png",
        "turntable-opacity-normals.gif", "turntable-opacity-normals.webp", "sheet-opacity-normals.png",
    ]  # fmt: skip
    for name, size in (("turntable.gif", (17, 17)), ("turntable-opacity-normals.webp", (34, 17))):
        with Image.open(tmp_path / "there" / name) as film:
            assert film.size == size and film.n_frames == 9 and film.info["loop"] == 0, name
            film.load()
            assert film.info["duration"] in (40, 42)  # a GIF counts hundredths
    with Image.open(tmp_path / "there" / "sheet-opacity-normals.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (4 * (14 + 17 + 2) - 2, 8 * 19 - 2, 3)  # opacity, normals; then both of the ninth view
    first = layers(Asset.open(made).scene, orbit(9), 17, ["opacity"])["opacity"]
    np.testing.assert_allclose(pixels[14:31, :17, 0], first[0, 0].numpy() * 255, atol=1)
    np.testing.assert_allclose(pixels[80:97, :17, 0], first[8, 0].numpy() * 255, atol=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--what", "rgb,colour"], "no layer 'colour'; give one or more of rgb, opacity, depth, normals"),
        (["--what", ""], "no layer ''"),
        (["--format", "avi"], "format is 'avi'; give one or more of mp4, gif, webp, png"),
        (["--size", "33"], "size is 33; give an even number"),
        (["--frames", "1"], "1 frames at 24 per second; give at least 2"),
        (["--fps", "0"], "'--fps'.*See: sds3d render --help"),
        (["-f", "gif", "--fps", "60"], "at 60 per second.*50 in a GIF"),
        (["-f", "png", "--frames", "0"], "'--frames'.*See: sds3d render --help"),
    ],
)
def test_mistakes_are_named_before_anything_is_rendered(call, options, message):
    code, out, err = call("render", "nowhere", *options)
    assert code == 2 and not out and re.search(message, err), err


def test_an_unwritable_folder_is_named(call, made, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = call("render", made, "-o", "file", "--size", "16", "--frames", "2", "-q")
    assert code == 2 and "cannot write file/turntable.mp4" in err
