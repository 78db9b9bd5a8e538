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
from sds3d import config

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


@every_mode
def test_the_mode_between_two_steps_is_the_callers(mode, tmp_path):
    from sds3d import launch

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
from sds3d import modes
if sys.argv[1] == "used":
    with modes.training():
        pass
child = os.fork()
if child == 0:
    signal.alarm(60)
    try:
        with modes.training():
            os._exit(0)
    except ValueError as error:
        print(error, flush=True)
        os._exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(("before", "wanted"), [("used", "3"), ("imported", "0")])
def test_after_a_fork_it_says_what_to_do(before, wanted):
    """Where the parent had computed, a child would hang; where it had only imported sds3d, it works."""
    done = subprocess.run([sys.executable, "-c", FORK, before], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == wanted, done.stderr
    assert ('get_context("spawn")' in done.stdout) == (before == "used")
