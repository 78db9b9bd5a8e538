"""What every method must do whoever is asked: expectations by quadrature, gradients, and who is left alone."""

import pytest
import torch
from conftest import SCHEDULES, every_schedule
from numpy.polynomial.hermite_e import hermegauss
from test_methods import CASES, ask, objective
from torch import nn

from sds3d.cameras import Cameras
from sds3d.diffusion.guidance import Guidance
from sds3d.diffusion.timesteps import TimestepSampler
from sds3d.distill.core import ScoreObjective, surrogate
from sds3d.distill.critics import CriticConfig, ExactCritic, TrainedCritic
from sds3d.distill.score import METHODS
from sds3d.distill.weights import WEIGHTS, weight
from sds3d.networks.mlp import PointNet
from sds3d.prompts import VIEW_WORDS, view_negatives, with_view
from sds3d.students.base import Draw
from sds3d.teachers.mixture import Mixture, MixtureTeacher

every_case = pytest.mark.parametrize(
    ("name", "settings", "negative"), [case[:3] for case in CASES], ids=lambda v: str(v)[:20]
)
MODES = Mixture(torch.tensor([0.5, 0.2, 0.3]), torch.tensor([-1.0, 0.2, 1.4]).view(3, 1, 1, 1), 0.3)
CLASSES = {"a red mug": [0.1, 0.2, 0.7]}
MEAN, STD = 0.4, 0.6  # of the student


def by_quadrature(n: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes (n,) and weights (n,) of N(0, 1)."""
    nodes, weights = (torch.from_numpy(v) for v in hermegauss(n))
    return nodes, weights / weights.sum()


def divergence(parameters, alpha, sigma, mixture, prior):
    """KL(q_t || p_t) of the student N(mu, tau^2), noised, by quadrature over q_t; differentiable in (mu, tau)."""
    z, w = by_quadrature(200)
    mean, std = alpha * parameters[0], (alpha**2 * parameters[1] ** 2 + sigma**2).sqrt()
    x_t = (mean + std * z).view(-1, 1, 1, 1)
    log_q = torch.distributions.Normal(mean, std).log_prob(mean + std * z)
    levels = (v.expand(len(z)) for v in (alpha, sigma))
    log_p = mixture.log_density(x_t, *levels, torch.as_tensor(prior, dtype=torch.float64).log().expand(len(z), -1))
    return (w * (log_q - log_p)).sum()


@every_schedule
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("ratio", [0.3, 1.0, 4.0])
def test_the_expected_gradient_is_that_of_the_divergence(schedule, name, scale, ratio):
    """E[W d dx/dtheta] = W (sigma/alpha) grad of s KL(q_t || p_t(. | y)) + (1 - s) KL(q_t || p_t), critic exact."""
    parameters = torch.tensor([MEAN, STD], dtype=torch.float64, requires_grad=True)
    t = schedule.t_of_ratio(torch.tensor([ratio], dtype=torch.float64))
    alpha, sigma = schedule.alpha_sigma(t)

    teacher = MixtureTeacher(MODES, CLASSES, schedule)
    student = Mixture(torch.ones(1), torch.full((1, 1, 1, 1), MEAN), STD)
    critic = ExactCritic(MixtureTeacher(student, {"a red mug": [1.0]}, schedule))
    goal = ScoreObjective(teacher, METHODS["vsd"](scale=scale), TimestepSampler(0.1, 0.9), name, critic=critic)
    nodes, weights = by_quadrature()
    z, noise = (v.reshape(-1, 1, 1, 1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    share = (weights[:, None] * weights).flatten()
    images = parameters[0] + parameters[1] * z
    draw = Draw(images, ["a red mug"] * len(z), None, torch.arange(len(z)))
    g = goal.gradient(goal.query(draw, images, t.expand(len(z)), noise))
    (found,) = torch.autograd.grad((share * (g * images).flatten()).sum(), parameters)

    kl = scale * divergence(parameters, alpha, sigma, MODES, CLASSES["a red mug"])
    kl = kl + (1 - scale) * divergence(parameters, alpha, sigma, MODES, MODES.weights)
    (gradient,) = torch.autograd.grad(kl, parameters)
    expected = weight(name, alpha, sigma) * (sigma / alpha) * gradient
    assert ((found - expected).abs() <= 0.01 * expected.abs()).all(), (found, expected)


@every_case
def test_autograd_gives_the_inner_product_s_gradient(name, settings, negative):
    """Through a student that is not linear, with several samples: d/dtheta <W d, x> / B."""
    g = torch.Generator().manual_seed(0)
    basis, noise = torch.randn((2, 3, 2, 4, 4), generator=g, dtype=torch.float64)
    theta = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True)
    images = torch.tanh(theta.view(3, 1, 1, 1) * basis + theta.sum())
    goal = objective(SCHEDULES["cosine"], name, settings, negative)
    q = ask(goal, images, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), noise)
    (found,) = torch.autograd.grad(surrogate(images, goal.gradient(q)), theta, retain_graph=True)
    w = weight(goal.weight, q.alpha, q.sigma).view(-1, 1, 1, 1)
    (expected,) = torch.autograd.grad((w * goal.method(q) * images).sum() / 3, theta)
    assert (found - expected).abs().max() < 1e-10 and expected.abs().max() > 1e-3


class Droppy(PointNet):
    """A network with dropout, left in training mode."""

    def forward(self, x_t, t):
        return nn.functional.dropout(super().forward(x_t, t) + 1, 0.5, self.training)


@pytest.mark.parametrize("kind", ["copy", "lora"])
def test_teacher_and_critic_are_left_alone_while_the_student_steps(kind):
    """No gradient reaches their parameters, and dropout is off, even where a network came in training mode."""
    teacher = MixtureTeacher(MODES, CLASSES)
    teacher.network = Droppy(1).train()
    critic = TrainedCritic(teacher, CriticConfig(kind), torch.Generator().manual_seed(0))
    goal = ScoreObjective(teacher, METHODS["vsd"](), TimestepSampler(0.1, 0.9), critic=critic)
    images = torch.zeros((4, 1, 1, 1), requires_grad=True)
    draw = Draw(images, ["a red mug"] * 4, None, torch.arange(4))
    first, second = (goal(draw, 0, torch.Generator().manual_seed(3)) for _ in range(2))
    first.loss.backward()
    assert images.grad is not None and float(images.grad.abs().max()) > 0
    assert all(p.grad is None for p in [*critic.parameters(), *teacher.network.parameters()])
    assert torch.equal(first.query.critic_eps(), second.query.critic_eps())
    critic.fit(draw, torch.Generator().manual_seed(1))
    assert torch.equal(first.query.critic_eps(), first.query.critic_eps())


def test_fixed_noise_is_the_same_at_every_step():
    images = torch.zeros((3, 1, 2, 2))
    draw = Draw(images, ["a red mug"] * 3, None, torch.arange(3))

    def noises(kind):
        goal = ScoreObjective(MixtureTeacher(MODES, CLASSES), METHODS["sds"](), TimestepSampler(0.1, 0.9), noise=kind)
        generator = torch.Generator().manual_seed(1)
        return [goal(draw, step, generator).query.noise for step in range(2)]

    first, second = noises("fixed")
    assert torch.equal(first, second) and not torch.equal(first[0], first[1])
    first, second = noises("fresh")
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="noise is 'old'; give fresh or fixed"):
        noises("old")


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "flow"])
@every_schedule
def test_perp_neg_follows_the_camera_in_every_schedule_and_parametrisation(schedule, kind):
    """Every sample's own weights, in one batched forward; the same eps whatever the network reports."""
    g = torch.Generator().manual_seed(0)
    modes = Mixture(torch.ones(4), torch.randn((4, 2, 3, 3), generator=g), 0.4)
    views = {f"a mug, {view}": torch.eye(4)[i] + 0.1 for i, view in enumerate(VIEW_WORDS)}
    teacher = MixtureTeacher(modes, {"a mug": [1.0] * 4, **views}, schedule, kind)
    places = [(0.0, 0.0), (100.0, 20.0), (180.0, 0.0), (300.0, 60.0), (300.0, 75.0)]  # the last from overhead
    azimuth, elevation = torch.tensor(places).T
    cameras = Cameras(azimuth, elevation, torch.full((5,), 3.0), torch.full((5,), 40.0))
    x, noise = torch.randn((2, 5, 2, 3, 3), generator=g, dtype=torch.float64)
    t = schedule.t_of_ratio(torch.tensor([0.9, 0.9, 2.0, 5.0, 2.0], dtype=torch.float64))
    guidance = Guidance(perp_neg=1.5)
    goal = ScoreObjective(teacher, METHODS["sds"](), TimestepSampler(0.1, 0.9), guidance=guidance)
    q = goal.query(Draw(x, ["a mug"] * 5, cameras, torch.arange(5)), x, t, noise)
    found = q.guided(4.0)
    assert q.teacher_images == [5 * 5]  # prompt, null prompt and three view words, at once
    for i, place in enumerate(places):
        one = slice(i, i + 1)

        def eps(prompt, one=one):
            return teacher.predict(q.x_t[one], t[one], [prompt]).eps

        words = with_view(["a mug"], cameras[one])[0]
        away, own = eps(""), eps(words) - eps("")
        total = own.clone()
        for view, weight_of in view_negatives(*place).items():
            other = eps(f"a mug, {view}") - away
            total -= 1.5 * weight_of * (other - (other * own).sum() / own.square().sum() * own)
        if place[1] > 60:
            total = own  # the prompt alone
        assert (found[one] - (away + 4.0 * total)).abs().max() < 1e-9
    assert (found - q.predict(q.x_t, t, "cond")[0].eps).abs().max() > 0.1


@every_schedule
def test_rescaled_guidance_keeps_the_spread_of_the_prompt_s_own_answer(schedule):
    g = torch.Generator().manual_seed(0)
    modes = Mixture(torch.ones(3), torch.randn((3, 2, 3, 3), generator=g), 0.4)
    teacher = MixtureTeacher(modes, {"a mug": [1.0, 0.0, 0.0]}, schedule)
    x, noise = torch.randn((2, 4, 2, 3, 3), generator=g, dtype=torch.float64)
    t = schedule.t_of_ratio(torch.tensor([0.4, 0.9, 2.0, 5.0], dtype=torch.float64))
    goal = ScoreObjective(teacher, METHODS["sds"](), TimestepSampler(0.1, 0.9), guidance=Guidance(rescale=1.0))
    q = goal.query(Draw(x, ["a mug"] * 4, None, torch.arange(4)), x, t, noise)
    alpha, sigma = (v.view(4, 1, 1, 1) for v in (q.alpha, q.sigma))
    guided = (q.x_t - sigma * q.guided(5.0)) / alpha
    own = (q.x_t - sigma * q.eps("cond")[0]) / alpha
    assert torch.allclose(guided.flatten(1).std(1), own.flatten(1).std(1))


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_rescaled_output_is_diffusers_guidance_rescale(kind):
    """Which acts on what the network predicts: eps of most Stable Diffusions, v of some."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    schedule, g = SCHEDULES["linear"], torch.Generator().manual_seed(0)
    modes = Mixture(torch.ones(3), torch.randn((3, 2, 3, 3), generator=g), 0.4)
    teacher = MixtureTeacher(modes, {"a mug": [1.0, 0.0, 0.0]}, schedule, kind)
    x, noise = torch.randn((2, 4, 2, 3, 3), generator=g, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    found = {}
    for on in ("x0", "output"):
        guidance = Guidance(rescale=0.7, rescale_on=on)
        goal = ScoreObjective(teacher, METHODS["sds"](), TimestepSampler(0.1, 0.9), guidance=guidance)
        q = goal.query(Draw(x, ["a mug"] * 4, None, torch.arange(4)), x, t, noise)
        found[on] = q.guided(7.5)
    cond, uncond = (getattr(teacher.predict(q.x_t, t, [prompt] * 4), kind) for prompt in ("a mug", ""))
    theirs = rescale_noise_cfg(uncond + 7.5 * (cond - uncond), cond, guidance_rescale=0.7)
    alpha, sigma = (value.view(4, 1, 1, 1) for value in (q.alpha, q.sigma))
    theirs = theirs if kind == "eps" else alpha * theirs + sigma * q.x_t  # v's eps
    assert torch.allclose(found["output"], theirs, atol=1e-10)
    assert (found["output"] - found["x0"]).abs().max() > 0.01
