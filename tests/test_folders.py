"""Run folders that are damaged, shared or hostile: nothing of the user's is lost, nothing is revealed."""

import json
import multiprocessing
import os
import random
import re
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, started, until
from PIL import Image

from sds3d.config import load as configs
from sds3d.runs.folder import STEMS, Run
from sds3d.runtime import files
from sds3d.runtime.files import replacing, replacing_folder, sweep


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_damaged_pictures_are_left_out_and_named(call, made):
    progress = Path(made) / "progress"
    for name, damage in (("00003.png", b""), ("00006.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), ("00005.png", b"junk")):
        (progress / name).write_bytes(damage)
    for command in (("resume", made, "steps=9"), ("export", made)):
        code, _, err = call(*command)
        assert code == 0, err
        for name in ("00003.png", "00005.png", "00006.png"):
            assert re.search(f"warning: .*progress/{name} cannot be read", err), (name, err)


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: calls.append(stat.S_ISDIR(os.fstat(handle).st_mode)) or fsync(handle)
    )
    monkeypatch.setattr(Path, "replace", lambda self, to: calls.append("rename") or rename(self, to))
    with replacing(tmp_path / "a.txt") as part:
        part.write_text("a")
    assert calls == [False, "rename", True]
    calls.clear()
    with replacing_folder(tmp_path / "b") as folder:
        (folder / "c").mkdir()
        (folder / "c" / "d.txt").write_text("d")
    assert sorted(calls) == [False, True, True, True] and (tmp_path / "b" / "c" / "d.txt").read_text() == "d"


@pytest.fixture
def photos(tmp_path):
    """Somebody's pictures, which no run may touch."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("00050.png", "02024.png", "strip.png"):
        Image.new("RGB", (8, 8), "red").save(folder / name)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_progress_that_is_a_link_loses_nobody_a_picture(call, made, photos):
    progress = Path(made) / "progress"
    for path in progress.iterdir():
        path.unlink()
    progress.rmdir()
    progress.symlink_to(photos)
    code, _, err = call("resume", made, "steps=9")
    assert code == 2 and "progress is a link out of the run" in err, err
    code, _, err = call("export", made)  # which only reads it: nothing of it is shown
    assert code == 0 and "views at step" not in (Path(made) / "index.html").read_text(), err


def test_images_and_metrics_that_are_links_are_not_written_through(tmp_path, photos):
    run = Run.create(tmp_path / "out", "ball", "")
    (run.path / "images").symlink_to(photos)
    with pytest.raises(ValueError, match="images is a link out of the run"):
        run.folder("images")
    with pytest.raises(ValueError, match="images is a link out of the run"):
        run.sweep()
    (run.path / "metrics.jsonl").symlink_to(photos / "00050.png")
    with pytest.raises(ValueError, match=r"metrics.jsonl is a link"):
        run.append({"step": 1})
    (run.path / "progress").mkdir()
    (run.path / "progress" / "00050.png").symlink_to(photos / "00050.png")
    assert run.rows() == [] and run.pictures() == []
    run.rewind(0)
    assert run.own("progress/00050.png") is None


def checkpoint(folder: Path) -> Run:
    run = Run.create(folder, "ball", "")
    generator = torch.Generator().manual_seed(0)
    run.save_checkpoint({"step": 7, "student": {"w": torch.randn(40, 30, generator=generator), "n": torch.tensor(3)}})
    return run


def test_every_bit_of_a_checkpoint_counts(tmp_path):
    run = checkpoint(tmp_path)
    whole, good = run.checkpoint.read_bytes(), run.load_checkpoint()
    draws = random.Random(0)
    places = {*range(0, 700, 3), *(draws.randrange(len(whole)) for _ in range(300))}
    kept = 0
    for place in places:
        run.checkpoint.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draws.randrange(8)]) + whole[place + 1 :])
        try:
            state = run.load_checkpoint()
        except ValueError as error:
            assert "is damaged" in str(error) and "put a sound copy of it there, or start again with" in str(error)
            continue
        kept += 1  # such as a capital letter in an escape of the header: the same content
        assert state["step"] == 7 and all(torch.equal(state["student"][k], v) for k, v in good["student"].items())
    assert kept <= 3, kept
    for page in range(0, len(whole), 512):
        run.checkpoint.write_bytes(whole[:page] + bytes(len(whole[page : page + 512])) + whole[page + 512 :])
        with pytest.raises(ValueError, match="is damaged"):
            run.load_checkpoint()
    run.checkpoint.write_bytes(
        whole.replace(b'[\\"step\\", 7]', b'[\\"step\\", 9]').replace(b'step\\": 7', b'step\\": 9')
    )
    assert run.checkpoint.read_bytes() != whole
    with pytest.raises(ValueError, match="its content is not what was written"):
        run.load_checkpoint()


@pytest.mark.parametrize("earlier", [{}, {"digest": "of another form"}])
def test_a_checkpoint_of_before_there_were_digests_still_loads(tmp_path, earlier):
    from safetensors import safe_open
    from safetensors.torch import save_file

    run = checkpoint(tmp_path)
    with safe_open(run.checkpoint, "pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    save_file(tensors, run.checkpoint, {"sds3d": header["sds3d"], **earlier})
    assert run.load_checkpoint()["step"] == 7


@pytest.mark.parametrize("skeleton", ["[" * 5000, "[]", '{"$tensor": "gone"}', '{"$tensor": []}', '{"$items": 3}'])
def test_a_checkpoint_whose_header_is_nonsense_is_refused(tmp_path, skeleton):
    from safetensors.torch import save_file

    run = checkpoint(tmp_path)
    save_file({"x": torch.zeros(1)}, run.checkpoint, {"sds3d": skeleton})
    with pytest.raises(ValueError, match="is damaged or is no checkpoint"):
        run.load_checkpoint()


def hold(folder: Path, pipe) -> None:
    """Another process that works on a run until it is killed."""
    held = Run.open(folder).lock()
    pipe.send(True)
    pipe.recv()
    held.close()


@pytest.fixture
def elsewhere():
    """Starts a process, waits until it has sent something through its pipe, and kills it at the end."""
    context, started = multiprocessing.get_context("spawn"), []

    def start(target, *given):
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(*given, theirs))
        process.start()
        started.append((process, ours))
        assert ours.poll(300) and ours.recv()
        return process

    yield start
    for process, _ in started:
        process.kill()
        process.join(300)


@pytest.mark.slow
def test_a_run_is_one_processs_at_a_time(call, made, elsewhere):
    process = elsewhere(hold, Path(made).resolve())
    before = (Path(made) / "metrics.jsonl").read_bytes()
    code, _, err = call("resume", made, "steps=9")
    assert code == 2 and "is in use: wait until that is done, or stop it" in err and f"process {process.pid} on" in err
    assert (Path(made) / "metrics.jsonl").read_bytes() == before
    process.kill()  # it lets go, however it ends
    process.join(300)
    code, _, err = call("resume", made, "steps=9")
    assert code == 0, err


PATIENT = """
import sys, time
from pathlib import Path
from conftest import BallTeacher
from sds3d.cli import main

ball, there = BallTeacher(), Path(sys.argv[2])

def predict(*given, **named):  # its run is still going on when the other program has ended
    while not there.exists():
        time.sleep(0.05)
    return BallTeacher.predict(ball, *given, **named)

ball.predict = predict
main(["resume", sys.argv[1], "steps=12", "--quiet"], ball)
"""


@pytest.mark.slow
def test_two_resumes_at_once_give_one_run(made, tmp_path):
    """The command line of the issue: without a lock both end with code 0 and every row is there twice."""
    places = [Path(__file__).parent, os.environ.get("PYTHONPATH", ""), Path(files.__file__).parents[1]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}
    command = [sys.executable, "-c", PATIENT, made, str(tmp_path / "go")]
    with ExitStack() as stack:
        both = [stack.enter_context(started(command, env=environment, stderr=subprocess.PIPE)) for _ in range(2)]
        until(lambda: any(process.poll() is not None for process in both), "one of them ends")
        (tmp_path / "go").write_text("")
        errors = [process.communicate(timeout=PATIENCE)[1].decode() for process in both]
    codes = sorted(process.returncode for process in both)
    steps = [json.loads(row)["step"] for row in (Path(made) / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 13)), errors
    assert codes == [0, 2] and any("is in use" in error for error in errors), errors


@pytest.mark.parametrize("make", ["mkfifo", "mkdir", "symlink"])
def test_what_is_no_lock_file_is_named_and_left(call, made, make):
    lock = Path(made) / ".lock"
    lock.unlink()
    getattr(os, make)(*(["elsewhere"] if make == "symlink" else []), lock)
    code, out, err = call("resume", made, "steps=9")
    assert (code, out) == (2, "") and err.count("\n") == 1, err
    assert f"{lock} is no lock file but a link, a folder, a pipe or a device: remove it" in err
    assert os.path.lexists(lock) and not Path("elsewhere").exists() and not (Path(made) / "elsewhere").exists()


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch):
    run = Run.create(tmp_path, "ball", "")
    monkeypatch.setattr(files, "fcntl", None)
    with pytest.warns(UserWarning, match="has no locks"):
        run.lock().close()
    with replacing(tmp_path / "a.txt") as part:
        part.write_text("a")
        sweep(tmp_path, "a")
        assert part.is_file()


def claim(out: Path, count: int, pipe) -> None:
    pipe.send(True)
    for i in range(count):
        Run.create(out, f"ball {os.getpid()} {i}", "")


@pytest.mark.slow
def test_new_runs_at_once_choose_different_numbers(tmp_path, elsewhere):
    processes = [elsewhere(claim, tmp_path, 15) for _ in range(4)]
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    numbers = [name.partition("-")[0] for name in names(tmp_path)]
    assert len(numbers) == 60 and len(set(numbers)) == 60


def write_for_ever(path: Path, pipe) -> None:
    with replacing(path) as part:
        part.write_text("half")
        pipe.send(True)
        pipe.recv()


@pytest.mark.slow
def test_leftovers_of_dead_processes_go_on_resume_and_nothing_else(call, made, elsewhere):
    folder = Path(made)
    dead = [
        ".checkpoint-abcd1234.safetensors",
        ".turntable-q_x1y2z3.mp4",
        "progress/.00050-abcd1234.png",
        ".metrics-zzzzzzzz.jsonl",
    ]
    others = [".gitignore", ".notes-abcd1234.txt", ".checkpoint-old.safetensors", "progress/.hidden.png"]
    for name in (*dead, *others):
        (folder / name).write_text("x")
    (folder / ".pipeline-abcd1234" / "new").mkdir(parents=True)
    (folder / ".mesh-abcd1234.glb").symlink_to(folder / "mesh.glb")
    elsewhere(write_for_ever, folder.resolve() / "eval.png")
    (living,) = folder.glob(".eval-*.png")
    code, _, err = call("resume", made, "steps=8")
    assert code == 0, err
    assert not any((folder / name).exists() for name in (*dead, ".pipeline-abcd1234"))
    assert all(os.path.lexists(folder / name) for name in (*others, ".mesh-abcd1234.glb", living.name))


def test_a_folder_that_was_being_replaced_comes_back(tmp_path):
    (tmp_path / ".pipeline-abcd1234" / "old").mkdir(parents=True)
    (tmp_path / ".pipeline-abcd1234" / "old" / "x").write_text("x")
    sweep(tmp_path, STEMS)
    assert names(tmp_path) == ["pipeline"] and names(tmp_path / "pipeline") == ["x"]


def test_a_run_that_ends_in_its_first_step_leaves_no_folder_and_names_no_checkpoint(
    call, in_folder, tiny, ball_teacher
):
    ball_teacher.colour = (float("nan"), 0.0, 0.0)
    code, _, err = call("generate", "a red ball", *tiny)
    assert code == 1 and "non-finite gradient at step 0" in err, err
    assert "Nothing was saved yet: begin again" in err and "checkpoint" not in err.replace("Nothing was saved", ""), err
    assert list((in_folder / "outputs").iterdir()) == []


class Fails:
    """A teacher that answers NaN from some call on."""

    def __init__(self, teacher, after: int):
        self.teacher, self.left = teacher, after

    def __getattr__(self, name):
        return getattr(self.teacher, name)

    def predict(self, *given, **named):
        self.left -= 1
        if self.left < 0:
            self.teacher.colour = (float("nan"), 0.0, 0.0)
        return self.teacher.predict(*given, **named)


@pytest.mark.slow
@pytest.mark.parametrize("after, saved", [(2, False), (5, True)])
def test_a_run_that_diverges_says_what_it_has_left_and_resumes(call, tiny, ball_teacher, after, saved):
    calls = Fails(ball_teacher, after)
    how = "log.save_every=2" if saved else "log.save_every=6"
    code, _, err = call("generate", "a red ball", *tiny, how, teacher=calls)
    assert code == 1 and "non-finite" in err
    assert ("checkpoint.safetensors was saved before and is intact" in err) == saved
    assert ("Nothing was saved yet: begin again" in err) != saved
    run = Path("outputs/00001-a-red-ball")
    assert run.is_dir() and (run / "checkpoint.safetensors").is_file() == saved
    ball_teacher.colour, calls.left = (0.9, 0.1, 0.1), 10**6
    code, _, err = call("resume", str(run), teacher=calls)
    assert code == 0, err
    assert [row["step"] for row in Run.open(run).rows()] == list(range(1, 7))


def test_a_checkpoint_that_is_gone_is_not_begun_anew(call, made):
    (Path(made) / "checkpoint.safetensors").unlink()
    before = (Path(made) / "metrics.jsonl").read_bytes()
    code, _, err = call("resume", made)
    assert code == 2 and "has done 6 steps, and its checkpoint.safetensors is gone: put it back" in err
    assert (Path(made) / "metrics.jsonl").read_bytes() == before


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path):
    from dataclasses import replace

    from test_train import PLAN, Pixels, to_zero

    from sds3d.train import Diverged, train

    run, student = Run.create(tmp_path, "x", ""), Pixels()
    steps = train(student, {"zero": to_zero}, replace(PLAN, save_every=2), run)
    next(steps), next(steps), next(steps)
    with torch.no_grad():
        student.upper.fill_(float("inf"))
    with pytest.raises(Diverged, match="upper of the student is not finite after step 3"):
        steps.close()
    assert run.load_checkpoint()["step"] == 2


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on_with_its_run(in_folder, ball_teacher, tiny):
    from sds3d.evaluate import comparison as comparing
    from sds3d.runs import launch

    layer = configs.parse_overrides([text for text in tiny if not text.startswith("export")])
    wanted = comparing.Comparison(("a red ball",), ("sds",), student="scene", layer=layer, teacher=ball_teacher)
    out = in_folder / "out"
    made, steps = launch.start(wanted.config("a red ball", "sds", 0, out / "runs"), ball_teacher)
    for _ in range(5):
        next(steps)
    del steps  # killed: its last checkpoint is of step 4
    (entry,) = comparing.compare(wanted, out)
    assert names(out / "runs") == [made.path.name] and entry.run == f"runs/{made.path.name}"
    assert [row["step"] for row in made.run.rows()] == list(range(1, 7))
    (again,) = comparing.compare(wanted, out)
    assert again.run == entry.run and len(names(out / "runs")) == 1


def test_a_strangers_config_has_nothing_written_into_other_folders(in_folder, tmp_path):
    """pairs.folder and teacher.hf.cache of a run's config.yaml, on resume."""
    from dataclasses import replace

    from sds3d.runs import launch

    few = {"pairs.count": 2, "pairs.batch": 2, "pairs.steps": 1}
    config = configs.load(None, {"method": "dmd", "teacher.name": "digits"}, few, kind=configs.DistillConfig)
    home, private = tmp_path / "outputs", tmp_path / "private"
    for folder, fine in ((private, False), (home / "pairs" / "x", True), (tmp_path / "kept", True)):
        own = replace(config, pairs=replace(config.pairs, folder=str(folder)))
        if folder.name == "kept":
            list(launch.prepare(own))  # a new run: it is what the user asked for
            assert (folder / "pairs.json").is_file()
        if fine:
            list(launch.prepare(own, home))
            assert (folder / "pairs.json").is_file()
        else:
            with pytest.raises(
                ValueError, match="the run's pairs are gone from .*private, and resume makes new ones in"
            ):
                list(launch.prepare(own, home))
            assert not folder.exists()
    private.mkdir()
    (private / "photo.jpg").write_text("x")
    for cache, kept in (
        ("", True),
        (str(private), False),
        (str(tmp_path / "new"), False),
        (str(tmp_path / "full"), True),
    ):
        (tmp_path / "full").mkdir(exist_ok=True)
        (tmp_path / "full" / f"{'a' * 40}.safetensors").write_text("x")
        own = replace(config, teacher=replace(config.teacher, hf=replace(config.teacher.hf, cache=cache)))
        if kept:
            assert launch._own_cache(own) == own
        else:
            with pytest.warns(UserWarning, match="which is no cache of prompts; using the usual one"):
                assert launch._own_cache(own).teacher.hf.cache == ""


@pytest.mark.slow
def test_a_run_whose_figures_stay_finite_and_whose_scene_does_not_is_named(call, tiny):
    """The issue's command line: density everywhere, and no word."""
    code, _, err = call("generate", "a red ball", *tiny, "steps=12", "optim.lr.grid=1e3")
    assert code in (0, 2), err  # 2: such a scene need not have a surface
    said = r"warning: .*covers [\d.]+ % of its views. the parameters of grid have grown to .*optim.lr.grid"
    assert re.search(said, err), err
    assert "optim.lr.grid is far too large" in Path("outputs/00001-a-red-ball/index.html").read_text()


def test_pixels_that_left_all_bounds_are_named(call, tiny):
    code, _, err = call("paint", "a red ball", "steps=3", "image.count=1", "optim.lr.pixels=1e3")
    assert code == 0 and re.search("warning: .*the parameters of pixels have grown to", err), err


@pytest.mark.parametrize("density, said", [(-30.0, "covers 0 %"), (30.0, r"covers (99\.\d|100) %")])
def test_a_scene_that_is_empty_or_fills_its_box_is_doubted(made, density, said):
    from sds3d.runs.scene import Asset

    asset = Asset.open(made)
    assert asset.doubt() == ""
    with torch.no_grad():
        asset.scene.field.b2[0] = density
    asset.scene.occupancy.cells.fill_(True)
    assert re.search(said, asset.doubt()) and "Training did not find an object" in asset.doubt()
