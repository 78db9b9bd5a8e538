"""The discriminator in a critic: what it learns, and the slope that a generator gets from its verdict."""

import copy

import pytest
import torch
from torch import nn

from sds3d.diffusion.noise import Schedule
from sds3d.distill.adversarial.generator_loss import Adversarial
from sds3d.distill.critics import CriticConfig, TrainedCritic
from sds3d.distill.discriminators import TrainedDiscriminator
from sds3d.networks.text import TextEncoder
from sds3d.networks.unet import UNet, UNetConfig
from sds3d.students.base import Draw
from sds3d.teachers.small import SmallTeacher

REAL, DRAWN = "a one", "a zero"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def teacher() -> SmallTeacher:
    """An untrained network of 8 x 8 images, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = UNetConfig((8, 8), (1,), condition=8, text=8, heads=2, size=8, channels=1, fold=1, cameras=False)
        words = ["a", "one", "zero"]
        unet, text = UNet(sizes).double(), TextEncoder(words, 8, 1, 2).double()
        for p in unet.parameters():  # the last layers begin at zero, where nothing depends on anything
            p.data += 0.1 * torch.randn_like(p)
    return SmallTeacher(unet.requires_grad_(False).eval(), text.requires_grad_(False).eval(), words)


def real(count: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
    """Bright on the left."""
    x = 0.3 * torch.randn((count, 1, 8, 8), generator=generator, dtype=torch.float64)
    x[..., :4] += 1.0
    return x, [REAL] * count


def drawn(count: int, generator: torch.Generator) -> Draw:
    """Bright on the right."""
    return Draw(real(count, generator)[0].flip(-1), [DRAWN] * count, None, torch.arange(count), encoded=True)


def adversary(teacher, weight=1.0, seed=0, **settings) -> TrainedDiscriminator:
    return TrainedDiscriminator(teacher, CriticConfig("copy", **settings), seeded(seed), real, weight)


def times_of_loss(teacher: SmallTeacher, schedule: Schedule) -> torch.Tensor:
    """Every t at which the network is asked in one loss: of real images, of drawn ones, and of the denoising."""
    other, found = copy.copy(teacher), []
    other.schedule = schedule
    for name in ("answer", "features"):
        ask = getattr(teacher, name)
        setattr(other, name, lambda net, x_t, t, *rest, ask=ask: found.append(t) or ask(net, x_t, t, *rest))
    draw = drawn(200, seeded(1))
    adversary(other).loss(draw, draw.x(teacher.encode), seeded(2))
    return torch.stack(found)


def test_no_level_is_asked_beyond_those_that_the_network_knows(teacher):
    table = Schedule.table(torch.tensor([0.9, 0.6, 0.3, 0.1]))
    found = times_of_loss(teacher, table)
    assert found.shape == (3, 200) and 0.7 < float(found.max()) <= table.t_noisiest == 0.75
    assert torch.equal(found, times_of_loss(teacher, Schedule.cosine()) * 0.75)  # all of [0, 1] where that is known


# the objective


class Flat(nn.Module):
    """A judge whose verdict is <w, x> + b."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 1).double()

    def logits(self, x, prompts, generator):
        return self.layer(x.flatten(1))[:, 0]


def test_the_slope_is_that_of_the_closed_form_and_stays_out_of_the_judge():
    """weight n mean softplus(-D): on x_i it is -weight n / B sigmoid(-D_i) w."""
    judge, x = Flat(), torch.randn((5, 3, 2, 2), generator=seeded(), dtype=torch.float64)
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    images = theta * x
    images.retain_grad()
    said = Adversarial(judge, 0.25)(Draw(images, [""] * 5, None, torch.arange(5), encoded=True), 0, seeded())
    said.loss.backward()
    w, b = judge.layer.weight.detach().view(1, 3, 2, 2), judge.layer.bias.detach()
    verdict = (0.7 * x * w).sum((1, 2, 3)) + b
    assert said.loss.item() == pytest.approx(0.25 * 12 * float((1 + (-verdict).exp()).log().mean()), rel=1e-12)
    expected = -0.25 * 12 / 5 * torch.sigmoid(-verdict).view(5, 1, 1, 1) * w
    assert torch.allclose(images.grad, expected, rtol=1e-10, atol=0)
    assert float(theta.grad) == pytest.approx(float((expected * x).sum()), rel=1e-10)
    assert float(said.metrics["verdict"]) == pytest.approx(float(verdict.mean()))
    assert all(p.grad is None for p in judge.parameters())
    assert bool((judge.logits(images - images.grad, [], None) > verdict).all())  # downhill is towards "real"


def test_nothing_arrives_in_the_critic_or_its_head(teacher):
    critic, x = adversary(teacher), drawn(4, seeded()).images.requires_grad_(True)
    goal = Adversarial(critic, 3e-3)
    goal(Draw(x, [DRAWN] * 4, None, torch.arange(4), encoded=True), 0, seeded(1)).loss.backward()
    assert float(x.grad.abs().min()) > 0
    assert all(p.grad is None for p in [*critic.parameters(), *teacher.network.parameters()])
    before, step, after = x.grad, 1e-4, []
    for sign in (1, -1):  # and it is the slope of the loss's own value
        moved = Draw(x.detach() + sign * step * before, [DRAWN] * 4, None, torch.arange(4), encoded=True)
        after.append(float(goal(moved, 0, seeded(1)).loss))
    assert (after[0] - after[1]) / (2 * step) == pytest.approx(float(before.square().sum()), rel=1e-4)


# the discriminator


def test_a_verdict_is_of_x_at_a_level_drawn_from_all(teacher, monkeypatch):
    seen, critic = [], adversary(teacher)
    x, features = real(200, seeded())[0], teacher.features
    monkeypatch.setattr(teacher, "features", lambda *asked: (seen.append(asked), features(*asked))[1])
    found = critic.logits(x, [REAL] * 200, seeded(1))
    ((network, x_t, t, prompts),) = seen
    assert network is critic.network and prompts == [REAL] * 200 and found.shape == (200,)
    assert 0 <= float(t.min()) < 0.05 and 0.95 < float(t.max()) <= 1
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in teacher.schedule.alpha_sigma(t))
    noise = (x_t - alpha * x) / sigma  # 12,800 numbers: standard errors 0.009 and 0.006
    assert abs(float(noise.mean())) < 0.04 and float(noise.std()) == pytest.approx(1, abs=0.03)


def test_its_loss_is_the_critic_s_and_the_weighted_softplus_of_both_verdicts(teacher):
    draw = drawn(6, seeded())
    critic, generator = adversary(teacher, 0.5), seeded(1)
    found = critic.loss(draw, draw.images, generator)
    again = seeded(1)
    there, prompts = real(6, again)
    told, missed = critic.logits(there, prompts, again), critic.logits(draw.images, draw.prompts, again)
    denoising = TrainedCritic.loss(critic, draw, draw.images, again)
    expected = denoising + 0.5 * ((1 + (-told).exp()).log().mean() + (1 + missed.exp()).log().mean())
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
    assert torch.equal(generator.get_state(), again.get_state())


@pytest.mark.slow
def test_it_learns_to_tell_real_images_from_drawn_ones(teacher):
    critic, generator, fresh = adversary(teacher, lr=2e-2), seeded(2), seeded(3)
    start = copy.deepcopy(critic.head.state_dict())

    def verdicts() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            images = (real(200, fresh)[0], drawn(200, fresh).images)
            return tuple(critic.logits(x, [REAL] * 200, fresh) for x in images)

    def wrong() -> float:
        good, bad = verdicts()
        return float(((good < 0).double().mean() + (bad > 0).double().mean()) / 2)

    before = wrong()
    for _ in range(40):
        draw = drawn(32, generator)
        draw.prompts = [REAL] * 32  # both are told alike: by the images alone
        critic.fit(draw, generator)
    good, bad = verdicts()
    assert before > 0.4 and wrong() < 0.15, (before, wrong())  # some are noised past telling
    assert float(good.mean()) > 0.5 > -0.5 > float(bad.mean())
    assert all(not torch.equal(v, start[k]) for k, v in critic.head.state_dict().items())
    assert all(p.grad is None for p in teacher.network.parameters())


def test_its_state_goes_on_to_the_same_bits(teacher):
    critic, again = adversary(teacher), adversary(teacher, seed=9)
    draw = drawn(8, seeded(4))
    assert torch.equal(critic.head.last.weight, adversary(teacher).head.last.weight)  # of its own seed
    assert not torch.equal(critic.head.last.weight, again.head.last.weight)
    for seed in range(3):
        critic.fit(draw, seeded(seed))
    again.load_state_dict(copy.deepcopy(critic.state_dict()))
    for seed in (5, 6):
        assert torch.equal(critic.fit(draw, seeded(seed)), again.fit(draw, seeded(seed)))
    for a, b in zip(critic.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(critic.parameters()) == len(list(critic.network.parameters())) + len(list(critic.head.parameters()))
