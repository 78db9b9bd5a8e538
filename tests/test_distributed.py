"""Several processes: the same global batch gives the same steps as one process, and so does a checkpoint of theirs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sds3d.config.load import DistillConfig, load
from sds3d.data import digits
from sds3d.networks.text import TextEncoder
from sds3d.networks.unet import UNet, UNetConfig
from sds3d.runs import build
from sds3d.runs.folder import Run
from sds3d.runtime import distributed as shares
from sds3d.runtime.distributed import Processes
from sds3d.teachers.small import SmallTeacher
from sds3d.train import train

ROOT = Path(__file__).parents[1]
SETTINGS = {"generator.batch": 8, "steps": 20, "log.save_every": 10, "real": "digits"}


def small_teacher() -> SmallTeacher:
    """An untrained network of 8 x 8 images, in float64."""
    sizes = UNetConfig((8, 8), (1,), condition=8, text=8, heads=2, size=8, channels=1, fold=1, cameras=False)
    words = digits.pictures().vocabulary()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet, text = UNet(sizes).double(), TextEncoder(words, 8, 1, 2).double()
        for p in unet.parameters():  # the last layers begin at zero, where nothing depends on anything
            p.data += 0.1 * torch.randn_like(p)
    teacher = SmallTeacher(unet.requires_grad_(False).eval(), text.requires_grad_(False).eval(), words)
    teacher.prompts = ("a handwritten zero", "a handwritten one")
    return teacher


def distil(folder: Path, method: str, processes: Processes = Processes()) -> dict:
    """Weights after 20 steps, from the folder's checkpoint on where there is one; the checkpoint of step 10 is kept as
    half.safetensors, the weights as end.pt."""
    run, teacher = Run(folder), small_teacher()
    config = load(None, {**SETTINGS, "method": method}, kind=DistillConfig)
    student = build.build_student(config, teacher, processes)
    critic = build.build_critic(config, teacher, processes)
    goals = build.build_objectives(build.build_objective(config, teacher, critic), config, student, processes)
    resume, losses = run.checkpoint.is_file(), []
    companions = {"critic": critic}
    for step in train(student, goals, config.plan(), run, resume, companions=companions, processes=processes):
        losses.append(step.loss)
        if step.step == 10 and processes.rank == 0:
            shutil.copy(run.checkpoint, folder / "half.safetensors")
    parts = {"network": student.network, "mean": student.means[0].module, "critic": critic.network}
    parts |= {"head": critic.head} if method == "dmd2" else {}
    found = {name: part.state_dict() for name, part in parts.items()} | {"losses": losses}
    if processes.rank == 0:
        torch.save(found, folder / "end.pt")
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """What runs end with, by method and processes: "dmd2 2 1" had its first ten steps in two and the others in one."""
    folder = tmp_path_factory.mktemp("runs")
    names = ["diffinstruct 1", "dmd2 1", "diffinstruct 2", "dmd2 2", "dmd2 1 2", "dmd2 2 1"]
    for name in names:
        (folder / name).mkdir()
    ends = {name: distil(folder / name, name.split()[0]) for name in names[:2]}
    shutil.copy(folder / "dmd2 1" / "half.safetensors", folder / "dmd2 1 2" / "checkpoint.safetensors")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*two, __file__, *(folder / name for name in names[2:5])]
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=300)
    ends |= {name: torch.load(folder / name / "end.pt", weights_only=True) for name in names[2:5]}
    shutil.copy(folder / "dmd2 2" / "half.safetensors", folder / "dmd2 2 1" / "checkpoint.safetensors")
    return ends | {"dmd2 2 1": distil(folder / "dmd2 2 1", "dmd2")}


def require_same(one: dict, other: dict) -> None:
    for part in one.keys() - {"losses"}:
        moved = 0.0
        for name, weights in one[part].items():
            assert weights.dtype == torch.float64
            # sums in another order: 1e-16 a step, which 20 steps of Adam grow to some 1e-11
            assert torch.allclose(weights, other[part][name], rtol=0, atol=1e-9), (part, name)
            moved += float(weights.abs().sum())
        assert moved > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["diffinstruct", "dmd2"])
def test_two_processes_take_the_same_steps_as_one(found, method):
    one, two = found[f"{method} 1"], found[f"{method} 2"]
    require_same(one, two)
    assert len(one["losses"]) == len(two["losses"]) == 20


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["2 1", "1 2"])
def test_a_checkpoint_goes_on_in_another_number_of_processes(found, processes):
    """Ten steps in the one, ten in the other: generator, running mean, critic and discriminator are those of an
    uninterrupted run in one process."""
    end = found[f"dmd2 {processes}"]
    assert len(end["losses"]) == 10
    require_same(found["dmd2 1"], end)


def test_shares_are_the_rows_of_the_whole():
    whole = torch.randn((6, 2), generator=torch.Generator().manual_seed(0))
    parts = [Processes(i, 3).randn((2, 2), torch.Generator().manual_seed(0)) for i in range(3)]
    assert torch.equal(torch.cat(parts), whole)
    with pytest.raises(ValueError, match="a batch of 7 cannot be shared by 3 processes"):
        Processes(0, 3).local_batch(7)


def test_processes_leave_their_group_before_the_interpreter_ends(tmp_path):
    """Else a thread that frees the tensor of a last exchange aborts the process, now and then."""
    program = tmp_path / "leave.py"
    program.write_text(
        "import atexit, torch, torch.distributed as dist\n"
        "atexit.register(lambda: print('left' if not dist.is_initialized() else 'still there', flush=True))\n"
        "from sds3d.runtime.distributed import join\n"
        "join()\n"
        "work = [dist.all_reduce(torch.ones(10000), async_op=True) for _ in range(300)]\n"
        "work[-2].wait()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(two, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("left") == 2, done.stdout


if __name__ == "__main__":  # one of two processes, which `found` starts
    for path in map(Path, sys.argv[1:]):
        distil(path, path.name.split()[0], shares.join())
