"""Videos and sheets of pictures that are known."""

import numpy as np
import pytest
import torch

from sds3d.media.sheet import contact_sheet, preview, resize, side_by_side
from sds3d.media.video import turntable


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
    more = read(side_by_side(truth, ours, tmp_path / "more.png", columns=3, size=8, below={"clay": truth[:2] + 1}))
    assert more.shape == (5 * (14 + 8) + 4 * 2, 3 * 10 - 2, 3)
    assert (more[:94] == sheet).all() and (more[110:118, :18] == 255).all()


def test_resizing_down_averages():
    board = (torch.arange(64) % 2).float().reshape(1, 1, 8, 8).expand(1, 3, 8, 8)
    torch.testing.assert_close(resize(board, 4), torch.full((1, 3, 4, 4), 0.5))
    assert resize(board, 32).shape == (1, 3, 32, 32) and resize(board, 32).max() <= 1
