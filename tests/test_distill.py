"""The core and SDS against closed forms on exact Gaussian teachers."""

import dataclasses
import math

import pytest
import torch
from conftest import SCHEDULES, every_schedule
from torch import Tensor

from sds3d.cameras import orbit
from sds3d.diffusion.noise import KINDS, Prediction, Schedule, target
from sds3d.diffusion.timesteps import TimestepSampler
from sds3d.distill.core import NonFiniteGradient, Query, ScoreObjective, surrogate
from sds3d.distill.score import METHODS
from sds3d.distill.score.sds import SDS
from sds3d.distill.weights import WEIGHTS, weight
from sds3d.runtime.ramp import Ramp
from sds3d.students.base import Draw

COND, UNCOND, NEGATIVE = (0.7, 0.4), (-0.2, 0.9), (-1.1, 0.5)  # (mean, std) of each branch's Gaussian


def bcast(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def pictures(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Tensor:
    seeded = torch.Generator().manual_seed(9)
    return torch.rand(*shape, dtype=dtype, generator=seeded, requires_grad=requires_grad)


class Gaussian:
    """An exact teacher: every pixel is N(mean, std^2), by prompt. Notes what it was asked."""

    views, image_size = "camera", 1

    def __init__(self, schedule: Schedule = SCHEDULES["cosine"], kind: str = "eps", views: str = "camera"):
        self.schedule, self.kind, self.views = schedule, kind, views
        self.asked: list[tuple] = []

    def encode(self, images):
        return images

    def decode(self, x):
        return x

    def check(self, prompt):
        if prompt == "gibberish":
            raise ValueError("unknown word 'gibberish'; nearest: rubbish")

    def predict(self, x_t, t, prompts, cameras=None, camera_mask=None):
        assert not torch.is_grad_enabled()
        self.asked.append((t, prompts, cameras, camera_mask))
        modes = [UNCOND if not p else NEGATIVE if p.startswith("ugly") else COND for p in prompts]
        mean, std = (bcast(v) for v in torch.tensor(modes, dtype=x_t.dtype).T)
        levels, rates = self.schedule.alpha_sigma(t), self.schedule.rates(t)
        alpha, sigma = (bcast(v) for v in levels)
        eps = sigma * (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        x0 = (x_t - sigma * eps) / alpha
        return Prediction(target(self.kind, x0, eps, *levels, rates), x_t, *levels, self.kind, rates)


def drawn(images: Tensor, group: Tensor | None = None, cameras=None) -> Draw:
    size = len(images)
    group = torch.arange(size) if group is None else group
    return Draw(images, ["a red mug"] * size, cameras, group)


def objective(teacher, scale: float = 1.0, **changes) -> ScoreObjective:
    return ScoreObjective(teacher, SDS(scale), **{"time": TimestepSampler(0.1, 0.9), **changes})


def gaussian_student(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Images mu + tau z and noise eps whose (z, eps) have the moments of two independent N(0, 1): all that a
    Gaussian teacher's expectation depends on, so four samples give it exactly. Both (4, 1, 1, 1)."""
    mu, tau = parameters
    z, eps = torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1]], dtype=torch.float64)
    return bcast(mu + tau * z), bcast(eps)


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scale", "negative"), [(1.0, ""), (7.5, ""), (0.3, ""), (7.5, "ugly")])
def test_sds_closed_form(schedule, kind, scale, negative):
    """With a teacher N(m, s^2) and a student N(mu, tau^2): E[eps_teacher - eps] = sigma alpha (mu - m) / V on mu and
    sigma alpha tau / V on tau, V = alpha^2 s^2 + sigma^2; guidance mixes two such terms."""
    parameters = torch.tensor([1.3, 0.25], dtype=torch.float64, requires_grad=True)
    for ratio in (0.138, 0.572, 1.618, 13.04):
        teacher = Gaussian(schedule, kind)
        t = schedule.t_of_ratio(torch.full((4,), ratio, dtype=torch.float64))
        images, eps = gaussian_student(parameters)
        ask = objective(teacher, scale, negative=negative)
        g = ask.gradient(ask.query(drawn(images), images, t, eps))
        (found,) = torch.autograd.grad(surrogate(images, g), parameters)
        alpha, sigma = (float(v[0]) for v in schedule.alpha_sigma(t))
        mu, tau = parameters.tolist()
        expected = [0.0, 0.0]
        for share, (mean, std) in ((scale, COND), (1 - scale, NEGATIVE if negative else UNCOND)):
            variance = alpha**2 * std**2 + sigma**2
            expected[0] += sigma**2 / (alpha**2 + sigma**2) * share * sigma * alpha * (mu - mean) / variance
            expected[1] += sigma**2 / (alpha**2 + sigma**2) * share * sigma * alpha * tau / variance
        assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-10
        if scale == 1:  # pulled down to the mean at 0.7, and narrower
            assert float(found[0]) > 0 and float(found[1]) > 0


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_sds_sample_by_sample(scale):
    """The noise itself is subtracted: its share has mean zero, so no expectation above sees it."""
    x, noise = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = objective(Gaussian()).query(drawn(x), x, torch.linspace(0.1, 0.9, 5), noise)
    alpha, sigma = bcast(q.alpha), bcast(q.sigma)
    expected = -noise
    for share, (mean, std) in ((scale, COND), (1 - scale, UNCOND)):
        off = alpha * (x - mean) + sigma * noise
        expected = expected + share * sigma * off / (alpha**2 * std**2 + sigma**2)
    assert (SDS(scale)(q) - expected).abs().max() < 1e-10


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_equal_g_at_equal_ratio_in_every_schedule(scale):
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    ratio = torch.tensor([0.05, 0.138, 0.572, 1.618, 13.04], dtype=torch.float64)
    for name in WEIGHTS:
        found = []
        for schedule in SCHEDULES.values():
            for kind in KINDS:
                ask = objective(Gaussian(schedule, kind), scale, weight=name)
                found.append(ask.gradient(ask.query(drawn(x), x, schedule.t_of_ratio(ratio), noise)))
        for other in found[1:]:
            assert (other - found[0]).abs().max() < 1e-10 * max(1.0, float(found[0].abs().max()))


@pytest.mark.parametrize("name", WEIGHTS)
def test_autograd_gradient_is_that_of_the_inner_product(name):
    """The student's gradient equals that of <W N d, x> / B, whatever lies between parameters and images."""
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(7, dtype=torch.float64, generator=generator, requires_grad=True)
    mixing = torch.randn(6, 3, 4, 4, 7, dtype=torch.float64, generator=generator)
    noise = torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=generator)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    images = torch.sigmoid(mixing @ parameters)
    ask = objective(Gaussian(kind="v"), 4.0, weight=name)
    query = ask.query(drawn(images), images, t, noise)
    (found,) = torch.autograd.grad(surrogate(images, ask.gradient(query)), parameters, retain_graph=True)
    w = bcast(weight(name, query.alpha, query.sigma))
    (expected,) = torch.autograd.grad((w * SDS(4.0)(query) * images).sum() / 6, parameters)
    assert (found - expected).abs().max() < 1e-12 * max(1.0, float(expected.abs().max()))


def test_call_is_the_surrogate_of_its_own_query():
    images = pictures(4, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    ask = objective(Gaussian(), 5.0)
    step = ask(drawn(images), 3, torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad(step.loss, images)
    g = ask.gradient(step.query)
    assert torch.allclose(found, g / 4, atol=1e-15)
    assert not any(v.requires_grad for v in (step.query.x, step.query.x_t, g))
    assert step.metrics["g_norm"] == pytest.approx(float(g.flatten(1).norm(dim=1).mean()))
    assert step.metrics["t"] == pytest.approx(float(step.query.t.mean()))
    counts = torch.histc(step.query.t, 5, 0, 1)
    names = [f"g_norm/t{i / 5:.1f}-{(i + 1) / 5:.1f}" for i in range(5) if counts[i] > 0]
    assert [k for k in step.metrics if "/" in k] == names
    norms = g.flatten(1).norm(dim=1)
    first = (step.query.t * 5).long() == int(torch.nonzero(counts)[0])
    assert step.metrics[names[0]] == pytest.approx(float(norms[first].mean()))


def test_the_teacher_gets_no_gradient():
    class Network(Gaussian):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 3, 1)

        def encode(self, images):
            return self.layer(images)  # differentiated, as a latent teacher's encoder is

        def predict(self, x_t, t, prompts, cameras=None, camera_mask=None):
            return Prediction(self.layer(x_t), x_t, *self.schedule.alpha_sigma(t), "eps")

    teacher = Network()
    teacher.layer.requires_grad_(False)
    images = pictures(2, 3, 4, 4, requires_grad=True)
    step = objective(teacher, 5.0)(drawn(images), 0, torch.Generator().manual_seed(0))
    step.loss.backward()
    assert all(p.grad is None for p in teacher.layer.parameters())
    assert float(images.grad.abs().max()) > 0
    # no path but the encoder's: the gradient on the images is the encoder's transpose applied to g / B
    g = objective(teacher, 5.0).gradient(step.query)
    expected = torch.einsum("oi,bohw->bihw", teacher.layer.weight[:, :, 0, 0], g / 2)
    assert torch.allclose(images.grad, expected, atol=1e-6)


def test_permute_the_batch_permute_the_answer():
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    t, order = torch.linspace(0.1, 0.9, 6, dtype=torch.float64), torch.tensor([4, 0, 5, 2, 1, 3])
    prompts = ["a red mug", "", "ugly", "a red mug", "", "a red mug"]
    ask = objective(Gaussian(), 7.5)

    def gradient(index):
        draw = Draw(x[index], [prompts[i] for i in index], orbit(6)[index], index)
        return ask.gradient(ask.query(draw, x[index], t[index], noise[index]))

    assert torch.equal(gradient(order), gradient(torch.arange(6))[order])


def test_one_t_a_group_and_the_same_seed_the_same_step():
    images, group = pictures(5, 3, 4, 4), torch.tensor([0, 0, 1, 1, 0])
    ask = objective(Gaussian(), 5.0)
    first, again, other = (ask(drawn(images, group), 0, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    t = first.query.t
    assert t[0] == t[1] == t[4] and t[2] == t[3] and t[0] != t[2]
    assert torch.equal(first.query.x_t, again.query.x_t) and torch.equal(first.loss, again.loss)
    assert not torch.equal(first.query.noise, other.query.noise) and t[0] != other.query.t[0]
    assert not torch.equal(first.query.noise[0], first.query.noise[1])  # views share t, not noise


def test_sds_collapses_to_the_mode():
    """What SDS does, being VSD with a point-mass critic: a whole Gaussian ends on the teacher's mean."""
    generator = torch.Generator().manual_seed(0)
    parameters = torch.tensor([-0.5, 0.4], requires_grad=True)  # mu, tau
    optimiser = torch.optim.Adam([parameters], lr=0.02)
    ask, lr = objective(Gaussian(), time=TimestepSampler(0.05, 0.95)), Ramp(100, 0.02, 0.0002, 400)
    for step in range(400):
        optimiser.param_groups[0]["lr"] = lr(step)
        z = torch.randn(64, 1, 1, 1, generator=generator)
        loss = ask(drawn(parameters[0] + parameters[1] * z), step, generator).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    mean, std = parameters.tolist()
    assert mean == pytest.approx(COND[0], abs=0.03)
    assert abs(std) < 0.05 * COND[1]


# asking the teacher


def query(teacher, **changes) -> Query:
    x = torch.zeros(3, 1, 2, 2)
    draw = drawn(x, cameras=orbit(3))
    return dataclasses.replace(objective(teacher).query(draw, x, torch.full((3,), 0.5), torch.ones_like(x)), **changes)


def test_branches_share_one_forward_and_are_kept():
    teacher = Gaussian()
    q = query(teacher, negative="ugly")
    uncond, cond = q.eps("uncond", "cond")
    assert len(teacher.asked) == 1 and teacher.asked[0][1] == [""] * 3 + ["a red mug"] * 3
    again, negative, cond_again = q.eps("uncond", "negative", "cond")
    assert len(teacher.asked) == 2 and teacher.asked[1][1] == ["ugly"] * 3
    assert torch.equal(again, uncond) and torch.equal(cond_again, cond)
    for eps, (mean, std) in ((uncond, UNCOND), (cond, COND), (negative, NEGATIVE)):
        a, s = math.cos(math.pi / 4), math.sin(math.pi / 4)
        assert torch.allclose(eps, torch.full_like(eps, s * (s - a * mean) / (a**2 * std**2 + s**2)), atol=1e-6)


def test_a_query_at_another_x_t_asks_anew_and_counts_with_the_first():
    teacher = Gaussian()
    q = query(teacher)
    (before,) = q.eps("cond")
    other = q.at(q.x_t + 1)
    (after,) = other.eps("cond")
    a = s = math.cos(math.pi / 4)
    assert torch.allclose(after - before, torch.full_like(after, s / (a**2 * COND[1] ** 2 + s**2)), atol=1e-6)
    assert torch.equal(q.eps("cond")[0], before) and torch.equal(other.eps("cond")[0], after)
    assert len(teacher.asked) == 2 and q.teacher_images == other.teacher_images == [3, 3]
    assert torch.equal(other.x, q.x) and torch.equal(other.t, q.t)


def test_guidance_one_asks_for_the_prompt_alone():
    teacher = Gaussian()
    objective(teacher, 1.0)(drawn(pictures(2, 3, 4, 4)), 0, torch.Generator().manual_seed(0))
    assert teacher.asked[0][1] == ["a red mug"] * 2
    SDS((0, 1, 9, 10))(query(teacher, step=0))
    SDS((0, 1, 9, 10))(query(teacher, step=1))
    assert [len(a[1]) for a in teacher.asked[1:]] == [3, 6]


@pytest.mark.parametrize("kept", [False, True])
def test_camera_teachers_get_cameras_and_no_words(kept):
    teacher = Gaussian(views="camera")
    query(teacher, negative="ugly", uncond_camera=kept).eps("cond", "uncond", "negative")
    _, prompts, cameras, mask = teacher.asked[0]
    assert prompts == ["a red mug"] * 3 + [""] * 3 + ["ugly"] * 3
    assert torch.equal(cameras.azimuth, orbit(3).azimuth.repeat(3))
    assert mask.tolist() == [True] * 3 + [kept] * 6


@pytest.mark.parametrize("kept", [False, True])
def test_word_teachers_get_words_and_no_cameras(kept):
    teacher = Gaussian(views="words")
    query(teacher, negative="ugly", uncond_camera=kept).eps("cond", "uncond", "negative")
    _, prompts, cameras, mask = teacher.asked[0]
    assert cameras is None and mask is None
    views = ["front view", "side view", "side view"]
    assert prompts[:3] == [f"a red mug, {v}" for v in views] and prompts[3:6] == [""] * 3
    assert prompts[6:] == ([f"ugly, {v}" for v in views] if kept else ["ugly"] * 3)


def test_images_without_cameras_are_asked_plainly():
    for views in ("camera", "words"):
        teacher = Gaussian(views=views)
        query(teacher, cameras=None).eps("cond")
        assert teacher.asked[0][1:] == (["a red mug"] * 3, None, None)


def test_unknown_and_missing_branches_are_refused():
    with pytest.raises(ValueError, match="critic.*cond, uncond, negative"):
        query(Gaussian()).eps("critic")
    with pytest.raises(ValueError, match="needs a negative prompt"):
        query(Gaussian()).eps("negative")


# what must not pass


def test_a_non_finite_gradient_stops_and_says_where():
    class Broken(Gaussian):
        def predict(self, x_t, t, prompts, cameras=None, camera_mask=None):
            answer = super().predict(x_t, t, prompts, cameras, camera_mask)
            answer.output[1] = torch.nan
            return answer

    images = pictures(3, 3, 4, 4)
    with pytest.raises(NonFiniteGradient, match="SDS.*step 17, t = 0.*teacher's prediction") as stop:
        objective(Broken())(drawn(images), 17, torch.Generator().manual_seed(0))
    t = TimestepSampler(0.1, 0.9).draw(17, torch.arange(3), torch.Generator().manual_seed(0), Schedule.cosine())
    assert (stop.value.method, stop.value.step) == ("SDS", 17)
    assert stop.value.t == pytest.approx(float(t[1]))
    images[2, 0, 0, 0] = torch.inf
    with pytest.raises(NonFiniteGradient, match="student's own image"):
        objective(Gaussian())(drawn(images), 0, torch.Generator().manual_seed(0))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="dreamfusion"):
        objective(Gaussian(), weight="dreamfusion")
    with pytest.raises(ValueError, match="gibberish"):
        objective(Gaussian(), negative="gibberish")
    for scale in (-1, (0, 5, -2, 10)):
        with pytest.raises(ValueError, match="at least 0"):
            SDS(scale)
    with pytest.raises(ValueError, match="ramp"):
        SDS("high")


def test_methods_are_frozen_dataclasses_by_name():
    assert METHODS["sds"] is SDS
    for method in METHODS.values():
        assert dataclasses.is_dataclass(method) and method.__dataclass_params__.frozen
        assert "arXiv" in method.__doc__
        method()
