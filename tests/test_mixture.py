"""Exact teachers against autograd, quadrature and brute force."""

import math

import pytest
import torch
from conftest import every_schedule

from sds3d.cameras import orbit
from sds3d.diffusion.noise import KINDS
from sds3d.diffusion.samplers.ddim import ddim
from sds3d.teachers.mixture import Mixture, MixtureTeacher


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_mixture(components: int = 5, *shape: int) -> Mixture:
    g = seeded(3)
    means = 2 * torch.randn((components, *shape), generator=g, dtype=torch.float64)
    stds = 0.2 + torch.rand((components, *shape), generator=g, dtype=torch.float64)
    return Mixture(torch.rand(components, generator=g) + 0.1, means, stds)


@every_schedule
def test_eps_is_minus_sigma_times_the_gradient_of_the_log_density(schedule):
    mixture = random_mixture(5, 2, 3, 1)
    teacher = MixtureTeacher(mixture, {"two": [0, 1, 0, 3, 0]}, schedule)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    x = torch.randn((6, 2, 3, 1), generator=seeded(), dtype=torch.float64, requires_grad=True)
    prompts = ["", "two"] * 3
    alpha, sigma = schedule.alpha_sigma(t)
    log_p = mixture.log_density(x, alpha, sigma, teacher.log_prior(prompts))
    (score,) = torch.autograd.grad(log_p.sum(), x)
    found = teacher.predict(x.detach(), t, prompts)
    assert (found.score - score).abs().max() < 1e-10 * score.abs().max()
    assert (found.eps + sigma.view(-1, 1, 1, 1) * score).abs().max() < 1e-10


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_the_same(schedule, kind):
    mixture = random_mixture(4, 3, 2, 2)
    x = torch.randn((5, 3, 2, 2), generator=seeded(), dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 5, dtype=torch.float64)
    x0, eps = mixture.posterior(x, *schedule.alpha_sigma(t))
    found = MixtureTeacher(mixture, schedule=schedule, kind=kind).predict(x, t, [""] * 5)
    assert found.kind == kind
    assert (found.x0 - x0).abs().max() < 1e-9 and (found.eps - eps).abs().max() < 1e-9


def test_posterior_mean_and_density_by_quadrature():
    mixture = Mixture(torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [1.5]]), torch.tensor([[0.4], [0.2]]))
    x = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
    p = sum(
        w * torch.exp(-0.5 * ((x - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
        for w, m, s in ((0.3, -1.0, 0.4), (0.7, 1.5, 0.2))
    )
    alpha, sigma = torch.tensor([0.8]), torch.tensor([0.6])
    for x_t in (-2.0, 0.1, 0.9):
        likelihood = torch.exp(-0.5 * ((x_t - 0.8 * x) / 0.6) ** 2) / (0.6 * math.sqrt(2 * math.pi))
        evidence = torch.trapezoid(p * likelihood, x)
        mean = torch.trapezoid(p * likelihood * x, x) / evidence
        point = torch.tensor([[x_t]])
        assert float(mixture.posterior(point, alpha, sigma)[0]) == pytest.approx(float(mean), rel=1e-6)
        assert float(mixture.log_density(point, alpha, sigma)) == pytest.approx(float(evidence.log()), abs=1e-6)


def test_samples_have_the_mixture_s_moments_and_its_classes():
    mixture = Mixture(torch.tensor([1.0, 3.0]), torch.tensor([[-2.0], [2.0]]), 0.5)
    x = mixture.sample(40_000, seeded())
    assert float(x.mean()) == pytest.approx(1.0, abs=0.03)
    assert float(x.var()) == pytest.approx(0.25 + 3.0, rel=0.02)
    assert float((x < 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert bool((mixture.sample(100, seeded(), torch.tensor([1.0, 0.0])) < 0.5).all())


@every_schedule
def test_deterministic_sampling_lands_on_the_mixture(schedule):
    mixture = Mixture(torch.tensor([0.25, 0.75]), torch.tensor([[-1.0], [1.0]]).view(2, 1, 1, 1), 0.15)
    teacher = MixtureTeacher(mixture, schedule=schedule, kind="x0")  # eps says nothing of x0 where alpha is 0
    end = torch.tensor([1.0], dtype=torch.float64)
    _, sigma = schedule.alpha_sigma(end)
    noise = sigma * torch.randn((4000, 1, 1, 1), generator=seeded(), dtype=torch.float64)
    *_, (_, x0, _) = ddim(lambda x, t: teacher.predict(x, t, [""] * len(x)), noise, schedule, 150)
    assert float((x0 < 0).double().mean()) == pytest.approx(0.25, abs=0.03)
    right = x0[x0 > 0]
    assert float(right.mean()) == pytest.approx(1.0, abs=0.02)
    assert float(right.std()) == pytest.approx(0.15, rel=0.15)


def test_images_are_a_softmax_weighted_mean():
    images = torch.rand((7, 3, 8, 8), generator=seeded())
    teacher = MixtureTeacher.of_images(images, classes={"first three": [1, 1, 1, 0, 0, 0, 0]})
    t = torch.tensor([0.3, 0.7, 0.95], dtype=torch.float64)
    x_t = torch.randn((3, 3, 8, 8), generator=seeded(1), dtype=torch.float64)
    found = teacher.predict(x_t, t, ["", "first three", "first three, side view"]).x0
    alpha, sigma = (v.view(-1, 1) for v in teacher.schedule.alpha_sigma(t))
    clean = (2 * images - 1).double().flatten(1)  # (7, D)
    distance = (x_t.flatten(1)[:, None] - alpha[..., None] * clean).square().sum(-1)  # (3, 7)
    logits = -0.5 * distance / sigma**2
    logits[1:, 3:] = -torch.inf
    expected = (logits.softmax(-1) @ clean).view(3, 3, 8, 8)
    assert (found - expected).abs().max() < 1e-9
    assert torch.allclose(teacher.decode(teacher.encode(images)), images, atol=1e-6)


def test_a_told_camera_picks_the_view():
    images = torch.rand((8, 3, 4, 4), generator=seeded())
    teacher = MixtureTeacher.of_images(images, cameras=orbit(8))
    assert teacher.views == "camera"
    x = torch.zeros((8, 3, 4, 4), dtype=torch.float64)
    t = torch.full((8,), 0.999, dtype=torch.float64)
    told = teacher.predict(x, t, [""] * 8, orbit(8)).x0
    assert (told - (2 * images - 1)).abs().max() < 0.01  # 45 degrees away is 4.5 standard deviations
    mask = torch.arange(8) < 4
    half = teacher.predict(x, t, [""] * 8, orbit(8), mask).x0
    assert torch.equal(half[:4], told[:4])
    assert torch.allclose(half[4:], teacher.predict(x[4:], t[4:], [""] * 4).x0)


def test_point_masses_without_noise_stay_finite():
    teacher = MixtureTeacher.of_images(torch.rand((2, 3, 4, 4), generator=seeded()))
    x = teacher.mixture.means[:1]
    found = teacher.predict(x, torch.zeros(1, dtype=torch.float64), [""])
    assert torch.equal(found.eps, torch.zeros_like(x))


def test_what_makes_no_mixture_is_refused():
    means = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="as many weights"):
        Mixture(torch.ones(3), means, 1.0)
    for weights, stds in (([1.0, -1.0], 1.0), ([0.0, 0.0], 1.0), ([1.0, 1.0], -1.0)):
        with pytest.raises(ValueError, match="at least 0"):
            Mixture(torch.tensor(weights), means, stds)
    mixture = Mixture(torch.ones(2), means.view(2, 1, 1, 1), 1.0)
    with pytest.raises(ValueError, match="needs 2 weights"):
        MixtureTeacher(mixture, {"a": [1.0]})
    with pytest.raises(ValueError, match="does not know 'b'; its prompts are 'a'"):
        MixtureTeacher(mixture, {"a": [1.0, 0.0]}).check("b")
    with pytest.raises(ValueError, match="does not know"):
        MixtureTeacher(mixture).predict(torch.zeros(1, 1, 1, 1), torch.ones(1), ["b"])
