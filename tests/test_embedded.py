"""Called from other programs: in torch's modes, in a thread, beside an event loop, after a fork, without a home."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import TINY

import sds3d
from sds3d.config import load as config
from sds3d.runs import launch
from sds3d.runtime.device import pick_device
from sds3d.teachers.hf.prompt_embedder import PromptEmbedder

MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
SMALL = {**config.parse_overrides(TINY), "steps": 2, "device": "cpu", "backend": "torch"}


def modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")


def make_scene(out: Path, **overrides) -> torch.Tensor:
    """What a run ends with."""
    made = sds3d.generate("a red mug", **config.parse_overrides([f"out={out}"]), **SMALL, **overrides)
    assert (made.path / "mesh.glb").is_file()
    return torch.cat([p.detach().flatten() for group in made.student.param_groups().values() for p in group])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> torch.Tensor:
    return make_scene(tmp_path_factory.mktemp("plain"))


@pytest.mark.slow
@every_mode
def test_a_scene_is_made_in_any_mode(mode, plain, tmp_path):
    """The same, bit for bit, and the caller's mode is as it was."""
    with mode():
        before = modes()
        found = make_scene(tmp_path)
        assert modes() == before
        (run,) = tmp_path.glob("0*")
        again = sds3d.Asset.open(run, "cpu", "torch")
        assert again.render(resolution=16).size == (16, 16)
    assert torch.equal(found.clone(), plain)


@pytest.mark.slow
@every_mode
def test_the_mode_between_two_steps_is_the_callers(mode, tmp_path):
    told = config.load("a red mug", SMALL, {"out": str(tmp_path), "method": "vsd"}, kind=config.Config)
    with mode():
        before = modes()
        _, steps = launch.start(told)
        assert modes() == before
        next(steps)
        assert modes() == before
        steps.close()
        assert modes() == before
        (run,) = tmp_path.glob("0*")
        made, steps = launch.resume(run)
        assert [step.step for step in steps] == [2]
    assert modes() == (True, False, False)


@every_mode
def test_a_generator_is_trained_in_any_mode(mode, tmp_path):
    with mode():
        few = {"steps": 2, "out": str(tmp_path), "device": "cpu", "generator": {"batch": 4}}
        made = sds3d.train_generator(teacher="digits", method="dmd2", **few)
        images = sds3d.load_generator(made.path, "cpu")(["a handwritten seven"] * 2)
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()


@pytest.mark.slow
def test_in_a_thread_and_beside_an_event_loop(plain, tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(make_scene(tmp_path / "thread")))
    thread.start()
    thread.join()

    async def cell():
        found.append(make_scene(tmp_path / "cell"))

    asyncio.run(cell())
    assert len(found) == 2 and all(torch.equal(one, plain) for one in found)


FORK = """
import os, signal, sys, sds3d
from sds3d.runtime import torch_modes
if sys.argv[1] == "used":
    with torch_modes.training():
        pass
child = os.fork()
if child == 0:
    signal.alarm(60)
    try:
        with torch_modes.training():
            os._exit(0)
    except ValueError as error:
        print(error, flush=True)
        os._exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(("before", "wanted"), [("used", "3"), ("imported", "0")])
def test_after_a_fork_it_says_what_to_do(before, wanted):
    """Where the parent had computed, a child would hang; where it had only imported sds3d, it works."""
    done = subprocess.run([sys.executable, "-c", FORK, before], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == wanted, done.stderr
    assert ('get_context("spawn")' in done.stdout) == (before == "used")


TEACHER_FORK = """
import os, signal, sys, torch, sds3d
from sds3d.teachers import small
from sds3d.teachers.drawing import sample
torch.set_num_threads(2)  # one has no others to wait for
def load():
    return small.load(small.packaged("digits"), dtype=torch.float32)
if sys.argv[1] == "sampled":  # by a teacher that no file was read for
    from sds3d.teachers.mixture import Mixture, MixtureTeacher
    sample(MixtureTeacher(Mixture(torch.ones(1), torch.zeros(1, 3, 8, 8), 0.1), pixels=True), [""], 0, 1.0, None, 1)
teacher = load() if sys.argv[1] == "loaded" else None
child = os.fork()
if child == 0:
    signal.alarm(30)
    try:
        sample(teacher or load(), ["zero"], steps=1)
        os._exit(0)
    except ValueError as error:
        print(error, flush=True)
        os._exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(("before", "wanted"), [("sampled", "3"), ("loaded", "3"), ("imported", "0")])
def test_a_teacher_says_what_to_do_after_a_fork(before, wanted):
    """Loading alone starts torch's threads, too. A child that is not refused waits for them, and dies by its alarm."""
    done = subprocess.run([sys.executable, "-c", TEACHER_FORK, before], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == wanted, done.stdout + done.stderr
    assert ("loaded or computed something" in done.stdout) == (wanted == "3")


# where nothing of the user's can be written

READ_ONLY = """
import sys, warnings
from numba.core import caching
caching.CacheImpl._locator_classes = []  # as where neither the package's folder nor HOME can be written
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from sds3d.ops import numba_kernels
print(numba_kernels.FAST["cache"], *(str(one.message) for one in said))
"""


@pytest.mark.slow
def test_kernels_compile_where_they_cannot_be_kept():
    done = subprocess.run([sys.executable, "-c", READ_ONLY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False compiled kernels cannot be cached") and "NUMBA_CACHE_DIR" in done.stdout


def test_a_prompt_that_cannot_be_kept_is_only_a_warning(tmp_path):
    words = PromptEmbedder(
        lambda texts: {"words": torch.ones(len(texts), 2)}, "mark", Path("/dev/null/x"), torch.device("cpu")
    )
    with pytest.warns(UserWarning, match="the embedding is not kept"):
        assert words(["a red mug"])["words"].shape == (1, 2)


# a run that was made on another machine

ELSEWHERE = "cuda:99"  # a GPU that no machine has


@pytest.fixture
def made_elsewhere(tmp_path) -> Path:
    """A scene's run of one step, whose config says a GPU and kernels that only run on one."""
    told = config.load("a red mug", SMALL, {"out": str(tmp_path)}, kind=config.Config)
    made, steps = launch.start(told)
    next(steps)
    steps.close()
    move_away(made.path)
    return made.path


def move_away(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    text = text.replace("device: cpu", f"device: {ELSEWHERE}").replace("backend: torch", "backend: tinycudann")
    (run / "config.yaml").write_text(text)
    assert ELSEWHERE in text


def test_a_run_made_on_a_gpu_goes_on_without_one(made_elsewhere, plain):
    """With what there is, saying so; its config.yaml stays, so that it can go back."""
    before = (made_elsewhere / "config.yaml").read_text()
    with pytest.warns(UserWarning) as said:
        made, steps = launch.resume(made_elsewhere)
    texts = " ".join(str(one.message) for one in said)
    here = pick_device("auto")
    assert f"made with device={ELSEWHERE}, which this machine does not have: it goes on with device={here}" in texts
    assert "made with backend=tinycudann" in texts
    assert [step.step for step in steps] == [2] and all(path.exists() for path in made.finish())
    assert (made_elsewhere / "config.yaml").read_text() == before
    assert sds3d.Asset.open(made_elsewhere).render(resolution=16).size == (16, 16)


def test_a_device_that_the_user_gives_is_still_refused(made_elsewhere):
    for wanted in (ELSEWHERE, "cuda:77"):
        for ask in (
            lambda wanted: launch.resume(made_elsewhere, {"device": wanted}),
            lambda wanted: sds3d.Asset.open(made_elsewhere, wanted),
            lambda wanted: sds3d.generate("a red mug", **{**SMALL, "device": wanted}),
        ):
            with pytest.raises(ValueError, match="sees no such GPU; give device=cpu"):
                ask(wanted)
    with pytest.raises(ValueError, match="tinycudann"), pytest.warns(UserWarning, match="goes on with device"):
        launch.resume(made_elsewhere, {"backend": "tinycudann"})


@pytest.mark.parametrize(
    "command", [["resume"], ["export", "--format", "ply"], ["render", "-f", "png", "--size", "16", "--frames", "2"]]
)
def test_commands_open_a_run_made_on_a_gpu(command, made_elsewhere, call_packaged):
    name, *rest = command
    code, _, err = call_packaged(name, str(made_elsewhere), *rest)
    assert code == 0, err
    assert ("goes on with device" in err) == (name == "resume")


def test_a_generator_made_on_a_gpu_goes_on_without_one(tmp_path, call_packaged):
    few = {"steps": 2, "out": str(tmp_path), "device": "cpu", "generator": {"batch": 4}}
    run = sds3d.train_generator(teacher="digits", method="diffinstruct", **few).path
    move_away(run)
    with pytest.warns(UserWarning, match="goes on with device"):
        _, steps = launch.resume(run)
    assert list(steps) == []
    code, _, err = call_packaged("sample", str(run), "a handwritten seven", "-o", str(tmp_path / "grid.png"), "-q")
    assert code == 0 and (tmp_path / "grid.png").is_file(), err
