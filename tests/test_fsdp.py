"""Weights shared by two processes (FSDP): the same steps, checkpoints and files as those of one process.

The file is also the program that every process runs.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sds3d.config.load import DistillConfig, load, to_yaml
from sds3d.data import digits
from sds3d.networks.text import TextEncoder
from sds3d.networks.unet import UNet, UNetConfig
from sds3d.runs import build, generator_parts, launch
from sds3d.runs.folder import Run
from sds3d.runs.generator import Generated
from sds3d.teachers.small import SmallTeacher
from sds3d.train import train

STEPS = 6


def tiny_teacher() -> SmallTeacher:
    """A small teacher in float64, whose weights are noise."""
    sizes = UNetConfig((8, 8), (1,), condition=8, text=8, heads=2, size=8, channels=1, fold=1, cameras=False)
    words = digits.pictures().vocabulary()
    networks, generator = (UNet(sizes), TextEncoder(words, 8, 1, 2)), torch.Generator().manual_seed(0)
    for network in networks:
        network.double().to(memory_format=torch.channels_last).requires_grad_(False).eval()  # as loaded ones are
        for weights in network.parameters():
            weights.copy_(0.3 * torch.randn(weights.shape, generator=generator, dtype=torch.float64))
    teacher = SmallTeacher(*networks, words)
    teacher.prompts = ("a handwritten zero", "a handwritten one")
    return teacher


def distil(folder: Path, method: str, last: int, resume: bool) -> None:
    """A run in ``folder`` from its beginning or its checkpoint up to a step; finished after the step STEPS."""
    teacher = tiny_teacher()
    settings = {"method": method, "steps": STEPS, "fsdp": True, "real": "digits", "device": "cpu"}
    settings |= {"generator.batch": 8, "optim.clip.generator": 1e-3, "pairs.count": 8, "pairs.batch": 8}
    settings |= {"pairs.folder": str(folder.parent / "pairs"), "pairs.sampler": "ddim", "pairs.steps": 1}
    config = load(None, settings, kind=DistillConfig)
    processes = launch.processes_of(config)
    if method == "dmd":
        if processes.rank == 0:
            list(generator_parts.make_pairs(config, teacher))
        processes.barrier()
    student, critic = build.build_student(config, teacher, processes), build.build_critic(config, teacher, processes)
    if processes.world_size > 1:
        kept = sum(weights.to_local().numel() for weights in student.network.parameters())
        assert kept < 0.7 * sum(weights.numel() for weights in teacher.network.parameters()), kept
    goals = build.build_objectives(build.build_objective(config, teacher, critic), config, student, processes)
    run = Run(folder)
    run.path.mkdir(exist_ok=True)
    if processes.rank == 0:
        run.write_text(run.config, to_yaml(config))
    made = Generated(run if processes.rank == 0 else None, config, student)
    plan, companions = replace(config.plan(), picture_every=2), {"critic": critic}
    loop = train(student, goals, plan, run, resume, made.picture, companions, processes)
    for step in loop:
        if step.step == last:
            break
    loop.close()
    if last == STEPS:
        list(made.finish())


def by_two(folder: Path, method: str, last: int, resume: bool) -> None:
    """The same by two processes, each with a part of the weights."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    arguments = [str(folder), method, str(last), str(resume)]
    done = subprocess.run([*start, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


def leaves(value, path: str = "") -> dict[str, object]:
    """Everything in a checkpoint, by its path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None:
        return {path: value}
    return {name: leaf for key, part in items for name, leaf in leaves(part, f"{path}/{key}").items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "first", "second"),
    [
        ("diffinstruct", by_two, distil),
        ("dmd2", distil, by_two),
        pytest.param("dmd", None, by_two, marks=pytest.mark.slow),
    ],
)
def test_sharded_weights_take_the_same_steps(tmp_path, method, first, second):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    distil(whole, method, STEPS, resume=False)
    if first is not None:
        first(parted, method, STEPS // 2, resume=False)
    second(parted, method, STEPS, resume=first is not None)
    one, two = (leaves(Run(folder).load_checkpoint()) for folder in (whole, parted))
    assert one.pop("/seconds") != two.pop("/seconds")
    assert one.keys() == two.keys() and len(one) > 500
    for name, value in one.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            # sums in another order: 1e-16 a step, which a few steps of Adam grow to some 1e-12
            assert torch.allclose(value, two[name], rtol=0, atol=1e-9), name
        else:
            assert torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name], name
    assert {file.name for file in whole.iterdir()} == {file.name for file in parted.iterdir()}
    assert (whole / "generator.safetensors").stat().st_size == (parted / "generator.safetensors").stat().st_size
    assert len(Run(parted).rows()) == STEPS and len(Run(parted).pictures()) == STEPS // 2


if __name__ == "__main__":
    distil(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "True")
