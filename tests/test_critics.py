"""Critics: equal to the teacher at first, then to the student; and what VSD does with one and SDS without."""

import copy
import math

import pytest
import torch
from torch import nn

from sds3d.cameras import orbit
from sds3d.diffusion.timesteps import TimestepSampler
from sds3d.distill.core import ScoreObjective
from sds3d.distill.critics import CriticConfig, ExactCritic, TrainedCritic
from sds3d.distill.score import METHODS
from sds3d.networks.lora import LoRA
from sds3d.runtime.ramp import Ramp
from sds3d.students.base import Draw
from sds3d.teachers import small
from sds3d.teachers.mixture import Mixture, MixtureTeacher
from sds3d.train import OptimConfig, Plan, train


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 2, size: int = 64) -> torch.Tensor:
    return torch.rand((n, 3, size, size), generator=seeded(4))


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("views", ["camera", "words"])
@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_a_critic_starts_as_the_teacher_and_leaves_it_alone(kind, views):
    teacher = small.load(views=views)
    before = {k: v.clone() for k, v in teacher.unet.state_dict().items()}
    critic = TrainedCritic(teacher, CriticConfig(kind=kind, lr=1e-3), seeded())
    cameras = orbit(2)
    x, t = 2 * images() - 1, torch.tensor([0.3, 0.8])
    prompts = ["a red mug, front view"] * 2 if views == "words" else ["a red mug"] * 2
    asked = cameras if views == "camera" else None
    theirs = teacher.predict(x, t, prompts, asked).v
    with torch.no_grad():
        assert torch.allclose(critic.predict(x, t, prompts, cameras, None).v, theirs, atol=1e-5)
    draw = Draw(images(), ["a red mug"] * 2, cameras, torch.zeros(2, dtype=torch.long))
    losses = [critic.fit(draw, seeded(1)) for _ in range(4)]  # one t and noise again and again
    assert losses[-1] < losses[0]
    with torch.no_grad():
        turned = critic.predict(x, t, prompts, orbit(2, start=90), None).v
        assert not torch.allclose(critic.predict(x, t, prompts, cameras, None).v, theirs, atol=1e-3)
        assert not torch.allclose(critic.predict(x, t, prompts, cameras, None).v, turned, atol=1e-5)  # it sees cameras
    assert all(torch.equal(v, before[k]) for k, v in teacher.unet.state_dict().items())
    assert all(p.grad is None for p in teacher.unet.parameters())
    again = TrainedCritic(teacher, CriticConfig(kind=kind, lr=1e-3), seeded(9))
    again.load_state_dict(copy.deepcopy(critic.state_dict()))
    assert critic.fit(draw, seeded(2)) == again.fit(draw, seeded(2))
    assert critic.fit(draw, seeded(3)) == again.fit(draw, seeded(3))


def test_lora_holds_the_changes_alone_and_shares_the_rest():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Flatten(), nn.Linear(48, 10), nn.Linear(10, 2))
    lora = LoRA(network, rank=4, scale=8.0, rng=seeded())
    assert lora.names == ["0.weight", "2.weight"]  # the last is too small for rank 4
    assert sum(p.numel() for p in lora.parameters()) == 4 * (12 + 72) + 4 * (10 + 48)
    assert not {k for k in lora.state_dict() if not k.startswith(("down", "up"))}
    x = torch.randn((3, 8, 4, 4), generator=seeded())
    assert torch.equal(lora(x), network(x))
    with torch.no_grad():
        lora.up[1].normal_(generator=seeded(1))
    merged = network[2].weight + 2.0 * lora.up[1] @ lora.down[1]
    expected = network[3](nn.functional.linear(network[1](network[0](x)), merged, network[2].bias))
    assert torch.allclose(lora(x), expected, atol=1e-5)
    lora(x).sum().backward()
    assert network[0].weight.grad is None and lora.down[1].grad is not None
    with pytest.raises(ValueError, match="rank is 0"):
        LoRA(network, rank=0)
    with pytest.raises(ValueError, match="rank is 48, and no weight"):
        LoRA(network, rank=48)


class Points:
    """A student that is a cloud of points: its images are the points themselves."""

    def __init__(self, points: torch.Tensor, batch: int = 256):
        self.points, self.batch = nn.Parameter(points), batch

    def draw(self, step, generator):
        index = torch.randint(len(self.points), (self.batch,), generator=generator)
        return Draw(self.points[index], [""] * self.batch, None, torch.arange(self.batch))

    def regularisers(self):
        return {}

    def param_groups(self):
        return {"points": [self.points]}

    def after_step(self, step, generator):
        pass


class Gauss(Points):
    """A student that draws mu + tau z."""

    def __init__(self, mean: float, std: float, batch: int = 256):
        self.parameters, self.batch = nn.Parameter(torch.tensor([mean, std])), batch

    def draw(self, step, generator):
        z = torch.randn((self.batch, 1, 1, 1), generator=generator)
        mean, std = self.parameters
        return Draw(mean + std * z, [""] * self.batch, None, torch.arange(self.batch))

    def param_groups(self):
        return {"parameters": [self.parameters]}


def run(student, teacher, method, critic, steps, lr, weight="sigma2"):
    group = next(iter(student.param_groups()))
    goal = ScoreObjective(teacher, method, TimestepSampler(0.02, 0.98), weight, critic=critic)
    ramp = Ramp(steps // 2, lr, lr / 50, steps)
    plan = Plan(steps, optim=OptimConfig(lr={group: ramp}, eps=1e-8))
    for _ in train(student, {"score": goal}, plan, companions={"critic": critic} if critic else {}):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vsd", "sds"])
def test_vsd_recovers_a_gaussian_and_sds_collapses(method):
    teacher = MixtureTeacher(Mixture(torch.ones(1), torch.full((1, 1, 1, 1), 0.7), 0.4), kind="v")
    student = Gauss(-0.5, 0.15)
    critic = TrainedCritic(teacher, CriticConfig("copy", steps=4, lr=2e-3), seeded()) if method == "vsd" else None
    run(student, teacher, METHODS[method](scale=1.0), critic, 700, 0.02)
    mean, std = student.parameters.tolist()
    assert mean == pytest.approx(0.7, rel=0.03)
    if method == "vsd":
        assert abs(std) == pytest.approx(0.4, rel=0.03)
    else:
        assert abs(std) < 0.05 * 0.4


def test_an_exact_critic_answers_and_is_never_fitted():
    teacher = MixtureTeacher(Mixture(torch.ones(1), torch.zeros(1, 1, 1, 1), 1.0))
    critic = ExactCritic(teacher)
    x, t = torch.randn((3, 1, 1, 1), generator=seeded()), torch.full((3,), 0.5)
    assert torch.equal(critic.predict(x, t, [""] * 3, None, None).eps, teacher.predict(x, t, [""] * 3).eps)
    assert critic.steps == 0 and critic.state_dict() == {}


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"steps": 0}, "critic.steps"),
        ({"lr": 0.0}, "critic.lr"),
        ({"rank": 0}, "critic.rank"),
        ({"camera_drop": 2.0}, "camera_drop"),
    ],
)
def test_impossible_critics_are_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        CriticConfig(**bad)


def ring(modes: int = 8) -> Mixture:
    """Eight modes on a circle, with weights from 0.04 to 0.25."""
    angle = torch.arange(modes) * (2 * math.pi / modes)
    means = torch.stack([angle.cos(), angle.sin()], -1).view(modes, 2, 1, 1)
    return Mixture(torch.tensor([0.25, 0.04, 0.16, 0.09, 0.20, 0.06, 0.12, 0.08]), means, 0.08)


def shares(points: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    """Share of the points nearest to each mode."""
    nearest = (points.flatten(1)[:, None] - mixture.means.flatten(1)).square().sum(-1).argmin(-1)
    return torch.bincount(nearest, minlength=len(mixture.weights)) / len(points)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vsd", "sds"])
def test_vsd_finds_eight_modes_of_unequal_weight_and_sds_does_not(method):
    mixture = ring()
    teacher = MixtureTeacher(mixture, kind="v")
    start = mixture.means[0] + 0.05 * torch.randn((2000, 2, 1, 1), generator=seeded(), dtype=torch.float64)
    student = Points(start.float(), batch=512)  # all in the first mode
    critic = TrainedCritic(teacher, CriticConfig("copy", steps=2, lr=2e-3), seeded()) if method == "vsd" else None
    run(student, teacher, METHODS[method](scale=1.0), critic, 1500, 0.02)
    points = student.points.detach()
    off = float((shares(points, mixture) - mixture.weights).abs().max())
    if method == "vsd":
        assert off < 0.03, shares(points, mixture)
        assert points.flatten(1).norm(dim=1).mean() == pytest.approx(1.0, abs=0.05)
    else:
        assert off > 0.1, shares(points, mixture)
