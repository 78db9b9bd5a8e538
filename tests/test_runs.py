"""Run folders: names, atomicity, and what happens when the disk says no."""

import errno
import json
import multiprocessing
import os
import re
from pathlib import Path

import pytest
import torch

from sds3d.runs.folder import Run, slug
from sds3d.runtime.files import replacing


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("a red mug", "a-red-mug"),
        ("  A *Red* mug, with a white handle! ", "a-red-mug-with-a-white-handle"),
        ("ünïcode 🙂 mug", "n-code-mug"),
        ("🙂", "run"),
        ("../../etc/passwd", "etc-passwd"),
        ("a green cube on a yellow cylinder, overhead view", "a-green-cube-on-a-yellow-cylinder"),
        ("x" * 60, "x" * 40),
        ("a" * 39 + " b", "a" * 39),
    ],
)
def test_slug(prompt, name):
    assert slug(prompt) == name
    assert re.fullmatch(r"[a-z0-9-]{1,40}", slug(prompt))


def test_numbers_go_on_and_other_files_do_not_disturb(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    first, second = (Run.create(tmp_path, "a red mug", "seed: 0\n") for _ in range(2))
    assert [first.path.name, second.path.name] == ["00001-a-red-mug", "00002-a-red-mug"]
    (tmp_path / "00041-other").mkdir()
    assert Run.create(tmp_path, "chair", "").path.name == "00042-chair"
    assert first.config.read_text() == "seed: 0\n"


def _claim_some(folder: str) -> None:
    for i in range(8):
        Run.create(folder, f"prompt {os.getpid()} {i}", "")


def test_processes_never_share_a_number(tmp_path):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        pool.map(_claim_some, [str(tmp_path)] * 3)
    numbers = [p.name.split("-")[0] for p in tmp_path.iterdir()]
    assert len(numbers) == 24
    assert len(set(numbers)) == 24


def state():
    parameter = torch.arange(6.0).reshape(2, 3).T  # not contiguous
    return {
        "step": 3,
        "nested": {"a": parameter, "b": [torch.tensor(7), 1.5, None, True], 4: ("x", 2.0**-1074)},
        "shared": parameter,
        "half": torch.tensor([1.5], dtype=torch.bfloat16),
        "bool": torch.tensor([True, False]),
        "generator": torch.Generator().manual_seed(5).get_state(),
        "empty": {},
        "nothing": torch.zeros(0, 2),
    }


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def test_a_checkpoint_gives_back_what_it_was_given(tmp_path):
    run = Run.create(tmp_path, "ball", "")
    run.save_checkpoint(state())
    assert_same(run.load_checkpoint(), state())
    run.save_checkpoint({"step": 4})  # no tensor at all, over an older one
    assert run.load_checkpoint() == {"step": 4}
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoint.safetensors", "config.yaml"]


def test_a_missing_or_damaged_checkpoint_is_one_sentence(tmp_path):
    run = Run.create(tmp_path, "ball", "")
    with pytest.raises(ValueError, match="no checkpoint.safetensors yet"):
        run.load_checkpoint()
    run.save_checkpoint(state())
    whole = run.checkpoint.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4], b"", b"junk" * 100, whole[:-1]):
        run.checkpoint.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged or is no checkpoint"):
            run.load_checkpoint()
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, run.checkpoint)  # sound, but not ours
    with pytest.raises(ValueError, match="is damaged or is no checkpoint"):
        run.load_checkpoint()
    save_file({"x": torch.zeros(1)}, run.checkpoint, metadata={"sds3d": '{"format": 99, "state": {}}'})
    with pytest.raises(ValueError, match="has format 99, this version reads 1"):
        run.load_checkpoint()


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_checkpoint_and_no_litter(tmp_path, monkeypatch):
    run = Run.create(tmp_path, "ball", "")
    run.save_checkpoint({"step": 1})
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"cannot write .*checkpoint.safetensors: No space left on device; make room"):
        run.save_checkpoint({"step": 2})
    assert run.load_checkpoint() == {"step": 1}
    assert sorted(p.name for p in run.path.iterdir()) == ["checkpoint.safetensors", "config.yaml"]


def test_a_write_that_dies_half_way_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="No space left"), replacing(tmp_path / "a.txt") as part:
        part.write_text("half")
        full()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_or_filled(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*file.*out=FOLDER"):
        Run.create(tmp_path / "file", "ball", "")
    with pytest.raises(ValueError, match="cannot write"):
        Run.create("/proc/nowhere", "ball", "")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ValueError, match="No space left"):
        Run.create(tmp_path / "out", "ball", "")
    assert not list((tmp_path / "out").iterdir())


def test_opening_what_is_no_run_names_those_that_are(tmp_path):
    Run.create(tmp_path, "a red mug", "")
    with pytest.raises(ValueError, match="there is no run folder .*00002-x; runs in .*: 00001-a-red-mug"):
        Run.open(tmp_path / "00002-x")
    with pytest.raises(ValueError, match=r"is not a run folder .*runs in .*: 00001-a-red-mug"):
        Run.open(tmp_path)


def test_rewinding_forgets_rows_and_pictures_after_the_checkpoint(tmp_path):
    run = Run.create(tmp_path, "ball", "")
    for step in range(1, 6):
        run.append({"step": step, "x": step / 3})
        run.save_picture(step, torch.full((2, 3, 4, 4), step / 5))
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "x')  # cut short by a crash
    run.rewind(3)
    assert run.rows() == [{"step": s, "x": s / 3} for s in (1, 2, 3)]
    assert all(json.loads(line) for line in run.metrics.read_text().splitlines())
    assert [p.stem for p in run.pictures()] == ["00001", "00002", "00003"]


def test_the_strip_has_the_pictures_oldest_on_top(tmp_path):
    from PIL import Image

    run = Run.create(tmp_path, "ball", "")
    for step in range(1, 13):
        run.save_picture(step, torch.full((2, 3, 4, 6), step / 20))
    strip = Image.open(run.path / "progress" / "strip.png")
    assert strip.size == (12, 8 * 4)
    rows = [strip.getpixel((0, 4 * i))[0] for i in range(8)]
    assert rows == sorted(rows)
    assert (rows[0], rows[-1]) == (round(255 / 20), round(255 * 12 / 20))
