"""Several processes: the same global batch gives the same steps as one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sds3d.shares import Share

ROOT = Path(__file__).parents[1]

PROGRAM = """
import sys
import torch
from sds3d.config import DistillConfig, load
from sds3d import make, shares
from sds3d.data import digits
from sds3d.networks.text import TextEncoder
from sds3d.networks.unet import UNet, UNetConfig
from sds3d.teachers.small import SmallTeacher
from sds3d.train import train

out, method = sys.argv[1:]
torch.manual_seed(0)
sizes = UNetConfig((8, 8), (1,), condition=8, text=8, heads=2, size=8, channels=1, fold=1, cameras=False)
words = digits.pictures().vocabulary()
unet, text = UNet(sizes).double(), TextEncoder(words, 8, 1, 2).double()
for p in unet.parameters():  # the last layers begin at zero, where nothing depends on anything
    p.data += 0.1 * torch.randn_like(p)
teacher = SmallTeacher(unet.requires_grad_(False).eval(), text.requires_grad_(False).eval(), words)
teacher.prompts = ("a handwritten zero", "a handwritten one")
share = shares.join()
config = load(None, {"method": method, "generator.batch": 8, "steps": 20, "real": "digits"}, kind=DistillConfig)
student = make.student(config, teacher, share)
critic = make.critic(config, teacher, share)
goals = make.objectives(make.objective(config, teacher, critic), config, student, share)
losses = [step.loss for step in train(student, goals, config.plan(), critic=critic, share=share)]
if share.index == 0:
    torch.save({"network": student.network.state_dict(), "critic": critic.network.state_dict(), "losses": losses}, out)
"""


def outcome(path: Path, method: str, processes: int) -> dict:
    program = path / "program.py"
    program.write_text(PROGRAM)
    out = path / f"{processes}.pt"
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*start, program, out, method], check=True, capture_output=True, env=environment, timeout=300)
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("method", ["diffinstruct", "dmd2"])
def test_two_processes_take_the_same_steps_as_one(tmp_path, method):
    one, two = (outcome(tmp_path, method, processes) for processes in (1, 2))
    for part in ("network", "critic"):
        moved = 0.0
        for name, weights in one[part].items():
            assert weights.dtype == torch.float64
            # sums in another order: 1e-16 a step, which 20 steps of Adam grow to some 1e-11
            assert torch.allclose(weights, two[part][name], rtol=0, atol=1e-9), (part, name)
            moved += float(weights.abs().sum())
        assert moved > 0
    assert len(one["losses"]) == len(two["losses"]) == 20


def test_shares_are_the_rows_of_the_whole():
    whole = torch.randn((6, 2), generator=torch.Generator().manual_seed(0))
    parts = [Share(i, 3).randn((2, 2), torch.Generator().manual_seed(0)) for i in range(3)]
    assert torch.equal(torch.cat(parts), whole)
    with pytest.raises(ValueError, match="a batch of 7 cannot be shared by 3 processes"):
        Share(0, 3).of(7)
