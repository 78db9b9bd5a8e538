"""Every method against its closed form: one Gaussian teacher, one Gaussian student.

With Gaussians everywhere every answer is linear in the student's image x and the noise e, so each method is an
expression in numbers (a, b, c), meaning a x + b e + c, written out here once more without tensors. For x = mu + tau z
the expected gradient is then W (a mu + c) on mu and W a tau on tau.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass

import pytest
import torch
from conftest import SCHEDULES, every_schedule
from torch import Tensor

from sds3d.diffusion.noise import Prediction, Schedule, target
from sds3d.diffusion.timesteps import TimestepSampler
from sds3d.distill.core import ScoreObjective, surrogate
from sds3d.distill.query import T_CLEAN
from sds3d.distill.score import METHODS
from sds3d.students.base import Draw

GAUSSIANS = {  # prompt -> mean and standard deviation
    "a red mug": (0.7, 0.4),
    "": (-0.2, 0.9),
    "ugly": (-1.1, 0.5),
    "a red mug, ugly": (0.1, 0.6),
    "a blue mug": (1.4, 0.3),
}
CRITIC = (0.3, 0.8)
SOURCE = -0.6  # the source image, every pixel


@dataclass
class Gaussians:
    """Every pixel is N(mean, std^2) by prompt, exactly."""

    schedule: Schedule
    table: dict[str, tuple[float, float]]
    kind: str = "v"
    views: str = "camera"
    image_size: int = 1

    def encode(self, images):
        return images

    def check(self, prompt):
        assert prompt in self.table

    def predict(self, x_t, t, prompts, cameras=None, camera_mask=None):
        mean, std = (v.view(-1, 1, 1, 1) for v in torch.tensor([self.table[p] for p in prompts], dtype=x_t.dtype).T)
        levels, rates = self.schedule.alpha_sigma(t), self.schedule.rates(t)
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in levels)
        variance = alpha**2 * std**2 + sigma**2
        x0 = mean + alpha * std**2 * (x_t - alpha * mean) / variance
        eps = sigma * (x_t - alpha * mean) / variance
        return Prediction(target(self.kind, x0, eps, *levels, rates), x_t, *levels, self.kind, rates)


@dataclass(frozen=True)
class Linear:
    """a x + b e + c."""

    a: float = 0.0
    b: float = 0.0
    c: float = 0.0

    def __add__(self, other: Linear) -> Linear:
        return Linear(self.a + other.a, self.b + other.b, self.c + other.c)

    def __mul__(self, k: float) -> Linear:
        return Linear(k * self.a, k * self.b, k * self.c)

    __rmul__ = __mul__

    def __sub__(self, other: Linear) -> Linear:
        return self + -1.0 * other


X, E = Linear(a=1.0), Linear(b=1.0)


@dataclass
class Level:
    """A noise level and what the Gaussians answer there."""

    alpha: float
    sigma: float

    def eps(self, x_t: Linear, prompt: str, table=GAUSSIANS) -> Linear:
        mean, std = table[prompt]
        return (self.sigma / (self.alpha**2 * std**2 + self.sigma**2)) * (x_t - Linear(c=self.alpha * mean))

    def guided(self, x_t: Linear, scale: float, away: str = "", prompt: str = "a red mug") -> Linear:
        return scale * self.eps(x_t, prompt) + (1 - scale) * self.eps(x_t, away)

    def noised(self, x: Linear, e: Linear) -> Linear:
        return self.alpha * x + self.sigma * e


def level(schedule: Schedule, t: float) -> Level:
    alpha, sigma = schedule.alpha_sigma(torch.tensor([t], dtype=torch.float64))
    return Level(float(alpha), float(sigma))


def inverted(schedule: Schedule, t: float, steps: int, scale: float) -> Linear:
    """DDIM inversion of x, step by step."""
    start = min(T_CLEAN, t)
    x_t = level(schedule, start).alpha * X
    for i in range(steps):
        here, there = (level(schedule, start + (t - start) * k / steps) for k in (i, i + 1))
        eps = here.guided(x_t, scale)
        x0 = (1 / here.alpha) * (x_t - here.sigma * eps)
        x_t = there.noised(x0, eps)
    return x_t


def sds(schedule, t, here, x_t):
    return here.guided(x_t, 4.0) - E


def sds_away_from_the_negative(schedule, t, here, x_t):
    return here.guided(x_t, 4.0, "ugly") - E


def nfsd(schedule, t, here, x_t):
    cond, uncond, negative = (here.eps(x_t, p) for p in ("a red mug", "", "ugly"))
    domain = uncond if here.sigma / here.alpha < 0.572 else uncond - negative
    return domain + 4.0 * (cond - uncond)


def csd(schedule, t, here, x_t):
    return here.eps(x_t, "a red mug") - here.eps(x_t, "")


def csd_towards_the_negative(schedule, t, here, x_t):
    return here.eps(x_t, "a red mug") - 0.7 * here.eps(x_t, "") - 0.3 * here.eps(x_t, "ugly")


def vsd(schedule, t, here, x_t):
    return here.guided(x_t, 4.0) - here.eps(x_t, "critic", {"critic": CRITIC})


def sdi(schedule, t, here, x_t):
    x_t = inverted(schedule, t, 6, -2.0)
    return here.guided(x_t, 4.0) - (1 / here.sigma) * (x_t - here.alpha * X)


def ism(schedule, t, here, x_t):
    s = max(t - 0.05, T_CLEAN)
    before, x_s = level(schedule, s), inverted(schedule, s, 3, 0.0)
    eps = before.eps(x_s, "")
    x_t = here.noised((1 / before.alpha) * (x_s - before.sigma * eps), eps)
    return here.guided(x_t, 4.0) - eps


def bridge_first(schedule, t, here, x_t):
    return here.guided(x_t, 4.0) - E


def bridge_second(schedule, t, here, x_t):
    return 2.0 * (here.eps(x_t, "a red mug") - here.eps(x_t, "a red mug, ugly"))


def dds(schedule, t, here, x_t):
    source_t = here.noised(Linear(c=SOURCE), E)
    return here.guided(x_t, 4.0) - here.guided(source_t, 4.0, prompt="a blue mug")


def dds_away_from_the_negative(schedule, t, here, x_t):
    source_t = here.noised(Linear(c=SOURCE), E)
    return here.guided(x_t, 4.0, "ugly") - here.guided(source_t, 4.0, "ugly", prompt="a blue mug")


# name, its settings, negative prompt, closed form
CASES = [
    ("sds", {"scale": 4.0}, "", sds),
    ("sds", {"scale": 4.0}, "ugly", sds_away_from_the_negative),
    ("nfsd", {"scale": 4.0}, "ugly", nfsd),
    ("csd", {}, "", csd),
    ("csd", {"negative_share": 0.3}, "ugly", csd_towards_the_negative),
    ("vsd", {"scale": 4.0}, "", vsd),
    ("diffinstruct", {"scale": 4.0}, "", vsd),  # the same direction; its own weight
    ("sdi", {"scale": 4.0, "inversion_scale": -2.0, "steps": 6, "eta": 0.0}, "", sdi),
    ("ism", {"scale": 4.0, "gap": 0.05, "steps": 3}, "", ism),
    ("bridge", {"scale": 4.0, "second": 10}, "ugly", bridge_first),
    ("bridge", {"scale": 4.0, "second": 0, "strength": 2.0}, "ugly", bridge_second),
    ("dds", {"scale": 4.0}, "", dds),
    ("dds", {"scale": 4.0}, "ugly", dds_away_from_the_negative),
]
every_case = pytest.mark.parametrize(("name", "settings", "negative", "closed_form"), CASES, ids=lambda v: str(v)[:20])


class ExactCritic:
    def __init__(self, schedule):
        self.teacher = Gaussians(schedule, {"a red mug": CRITIC})

    def predict(self, x_t, t, prompts, cameras, camera_mask):
        return self.teacher.predict(x_t, t, prompts)


def objective(schedule: Schedule, name: str, settings=None, negative="", kind="v", weight="auto") -> ScoreObjective:
    method = METHODS[name](**(settings or {}))
    return ScoreObjective(
        Gaussians(schedule, GAUSSIANS, kind),
        method,
        TimestepSampler(0.1, 0.9),
        weight,
        negative,
        critic=ExactCritic(schedule) if "critic" in method.NEEDS else None,
        source_prompt="a blue mug" if "source" in method.NEEDS else "",
    )


def ask(goal: ScoreObjective, x: Tensor, t: Tensor, noise: Tensor, step: int = 0):
    source = torch.full_like(x, SOURCE) if goal.source_prompt else None
    draw = Draw(x, ["a red mug"] * len(x), None, torch.arange(len(x)), source=source)
    return goal.query(draw, x, t, noise, step, torch.Generator().manual_seed(0))


W = {
    "sigma2": lambda v: v.sigma**2 / (v.alpha**2 + v.sigma**2),
    "x0": lambda v: v.sigma / v.alpha,
    "uniform": lambda v: 1.0,
}


@every_schedule
@pytest.mark.parametrize("kind", ["eps", "v"])
@every_case
def test_closed_form(schedule, kind, name, settings, negative, closed_form):
    """Expected gradient on mu and tau, by value and sign; four samples hold all the moments that matter."""
    mu, tau = parameters = torch.tensor([1.3, 0.25], dtype=torch.float64, requires_grad=True)
    z, e = torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1]], dtype=torch.float64).view(2, 4, 1, 1, 1)
    goal = objective(schedule, name, settings, negative, kind)
    for ratio in (0.2, 0.572 * 0.999, 0.572 * 1.001, 1.618, 6.0):
        t = schedule.t_of_ratio(torch.full((4,), ratio, dtype=torch.float64))
        images = mu + tau * z
        g = goal.gradient(ask(goal, images, t, e))
        (found,) = torch.autograd.grad(surrogate(images, g), parameters, retain_graph=True)
        here = level(schedule, float(t[0]))
        d = closed_form(schedule, float(t[0]), here, here.noised(X, E))
        w = W[goal.weight](here)
        expected = [w * (d.a * mu.item() + d.c), w * d.a * tau.item()]
        assert found.tolist() == pytest.approx(expected, rel=1e-8, abs=1e-10)


@every_schedule
@every_case
def test_sample_by_sample(schedule, name, settings, negative, closed_form):
    """The noise's own share has mean zero, so no expectation sees it."""
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn((2, 5, 2, 3, 3), generator=g, dtype=torch.float64)
    t = torch.linspace(0.1, 0.85, 5, dtype=torch.float64)
    goal = objective(schedule, name, settings, negative)
    found = goal.method(ask(goal, x, t, noise))
    for i in range(5):
        here = level(schedule, float(t[i]))
        d = closed_form(schedule, float(t[i]), here, here.noised(X, E))
        assert (found[i] - (d.a * x[i] + d.b * noise[i] + d.c)).abs().max() < 1e-9


@every_schedule
@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("name", ["dmd", "dmd2"])
def test_dmd_divides_each_image_s_gradient_by_its_distance_from_the_teacher_s(schedule, kind, name):
    """g = W N d, with N = 1 / max(mean |x - x0_s|, floor) over an image's own numbers, x0_s guided as d is."""
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn((2, 4, 2, 3, 3), generator=g, dtype=torch.float64)
    x = x * torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=torch.float64).view(4, 1, 1, 1)
    t = schedule.t_of_ratio(torch.tensor([0.3, 0.5, 0.9, 2.0], dtype=torch.float64))
    x[0], floor = x[0] + 0.6, 0.8
    goal = objective(schedule, name, {"scale": (0, 2.0, 6.0, 10), "floor": floor}, kind=kind)  # 4 at step 5
    found = goal.gradient(ask(goal, x, t, noise, step=5))
    assert goal.weight == "x0"
    apart = []
    for i in range(4):
        here = level(schedule, float(t[i]))
        x_t = here.noised(X, E)
        d, x0 = vsd(schedule, None, here, x_t), (1 / here.alpha) * (x_t - here.sigma * here.guided(x_t, 4.0))
        d, x0 = (v.a * x[i] + v.b * noise[i] + v.c for v in (d, x0))
        apart.append(float((x[i] - x0).abs().sum()) / 18)
        expected = here.sigma / here.alpha / max(apart[i], floor) * d
        assert (found[i] - expected).abs().max() < 1e-9
    assert min(apart) < floor < sorted(apart)[1]  # both sides of the floor are seen


# identities between the methods


def directions(schedule, *wanted, negative="ugly", seed=0, critic=None):
    g = torch.Generator().manual_seed(seed)
    x, noise = torch.randn((2, 4, 3, 2, 2), generator=g, dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.6, 0.85], dtype=torch.float64)
    found = []
    for name, settings in wanted:
        goal = objective(schedule, name, settings, negative if name in ("nfsd", "bridge") else "")
        q = ask(goal, x, t, noise)
        found.append(goal.method(q if critic is None else dataclasses.replace(q, critic=critic(q, noise))))
    return found


class PointMass:
    """The exact score of one image: eps is the noise itself."""

    def __init__(self, q, noise):
        self.q, self.noise = q, noise

    def predict(self, x_t, t, prompts, cameras, camera_mask):
        return Prediction(self.noise, x_t, self.q.alpha, self.q.sigma, "eps")


class TheTeacher:
    def __init__(self, q, noise):
        self.predict = lambda x_t, t, prompts, cameras, mask: q.teacher.predict(x_t, t, prompts)


@every_schedule
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_sds_is_vsd_with_a_point_mass_critic(schedule, scale):
    a, b = directions(schedule, ("sds", {"scale": scale}), ("vsd", {"scale": scale}), critic=PointMass)
    assert (a - b).abs().max() < 1e-10


@every_schedule
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_vsd_whose_critic_is_the_teacher_is_csd(schedule, scale):
    a, b = directions(schedule, ("vsd", {"scale": scale}), ("csd", {}), critic=TheTeacher)
    assert (a - (scale - 1) * b).abs().max() < 1e-10
    assert (a.abs().max() < 1e-10) == (scale == 1)


@every_schedule
def test_nfsd_subtracts_nothing_at_low_noise(schedule):
    (d,) = directions(schedule, ("nfsd", {"scale": 1.0, "switch": 1e9}))
    goal = objective(schedule, "sds", {"scale": 1.0})
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn((2, 4, 3, 2, 2), generator=g, dtype=torch.float64)
    (cond,) = ask(goal, x, torch.tensor([0.1, 0.3, 0.6, 0.85], dtype=torch.float64), noise).eps("cond")
    assert (d - cond).abs().max() < 1e-10


def test_nfsd_switches_sample_by_sample():
    """A (B,) mask that broadcasts over the width by accident would show here: B equals the width."""
    schedule = SCHEDULES["cosine"]
    low, high, mixed = (directions(schedule, ("nfsd", {"switch": s}), seed=3)[0][:, :, :, :] for s in (1e9, 0.0, 0.572))
    assert torch.equal(mixed[:2], low[:2]) and torch.equal(mixed[2:], high[2:])  # t = 0.3 is ratio 0.51


@pytest.mark.parametrize(
    ("name", "settings", "negative", "closed_form"),
    [c for c in CASES if c[0] not in ("sdi", "ism")],
    ids=lambda v: str(v)[:20],
)
def test_equal_g_at_equal_ratio_in_every_schedule_and_kind(name, settings, negative, closed_form):
    """But for SDI and ISM, whose inversions take steps in t: those agree in what they converge to."""
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn((2, 4, 3, 2, 2), generator=g, dtype=torch.float64)
    ratio = torch.tensor([0.2, 0.5, 1.6, 9.0], dtype=torch.float64)
    found = []
    for schedule in SCHEDULES.values():
        for kind in ("eps", "x0", "v", "flow"):
            goal = objective(schedule, name, settings, negative, kind, weight="x0")
            found.append(goal.gradient(ask(goal, x, schedule.t_of_ratio(ratio), noise)))
    for other in found[1:]:
        assert (other - found[0]).abs().max() < 1e-9 * max(1.0, float(found[0].abs().max()))


@every_case
def test_permute_the_batch_permute_the_answer(name, settings, negative, closed_form):
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn((2, 5, 3, 2, 2), generator=g, dtype=torch.float64)
    t, order = torch.linspace(0.1, 0.85, 5, dtype=torch.float64), torch.tensor([4, 0, 2, 1, 3])
    goal = objective(SCHEDULES["cosine"], name, settings, negative)
    straight = goal.gradient(ask(goal, x, t, noise))
    turned = goal.gradient(ask(goal, x[order], t[order], noise[order]))
    assert (straight[order] - turned).abs().max() < 1e-12


@pytest.mark.slow
@every_schedule
def test_inverting_and_sampling_again_returns_at_first_order(schedule):
    from sds3d.diffusion.samplers.ddim import ddim

    x = torch.linspace(-1.5, 2.0, 8, dtype=torch.float64).view(8, 1, 1, 1)
    goal, counts, errors = objective(schedule, "sds"), (20, 40, 80, 160), []
    t = schedule.t_of_ratio(torch.full((8,), 2.0, dtype=torch.float64))
    for steps in counts:
        q = ask(goal, x, t, torch.zeros_like(x))
        x_t = q.inverted(t, steps, 1.0)
        start = torch.full_like(t, T_CLEAN).minimum(t)

        def predict(x_s, s, q=q):
            return q.predict(x_s, s, "cond")[0]

        *_, (s, _, back) = ddim(predict, x_t, schedule, steps, t_start=t, t_end=start)
        alpha, _ = schedule.alpha_sigma(s)
        errors.append(float((back / alpha.view(-1, 1, 1, 1) - x).abs().max()))
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert 0.85 < orders[-1] < 1.15, (orders, errors)


# what is missing, and what cannot be


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_needs_is_asked_for_before_anything_runs(name):
    method = METHODS[name]()
    for need in method.NEEDS:
        with pytest.raises(ValueError, match=f"{type(method).__name__} needs a"):
            ScoreObjective(Gaussians(SCHEDULES["cosine"], GAUSSIANS), method, TimestepSampler(0.1, 0.9))
        assert need in ("critic", "negative", "source", "pairs", "real")


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("sds", {"scale": -1}),
        ("nfsd", {"scale": -1}),
        ("nfsd", {"switch": -1}),
        ("csd", {"negative_share": -1}),
        ("vsd", {"scale": -1}),
        ("sdi", {"steps": 0}),
        ("sdi", {"eta": 2.0}),
        ("ism", {"gap": 0.0}),
        ("bridge", {"second": -1}),
        ("dds", {"scale": -1}),
        ("diffinstruct", {"scale": -1}),
        ("dmd", {"floor": 0.0}),
        ("dmd", {"regression": -1}),
        ("dmd2", {"floor": 0.0}),
        ("dmd2", {"adversarial": -1}),
    ],
)
def test_settings_out_of_range_are_refused(name, bad):
    with pytest.raises(ValueError, match="at least|eta|gap|above 0"):
        METHODS[name](**bad)


def test_a_negative_prompt_that_changes_nothing_is_said():
    with pytest.warns(UserWarning, match="the negative prompt changes nothing: give method.negative_share"):
        objective(SCHEDULES["cosine"], "csd", negative="ugly")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective(SCHEDULES["cosine"], "csd", {"negative_share": [0, 0, 0.5, 10]}, negative="ugly")
        objective(SCHEDULES["cosine"], "csd")


def test_method_files_are_short_and_say_their_paper():
    from pathlib import Path

    import sds3d.distill.score

    for file in Path(sds3d.distill.score.__file__).parent.glob("*.py"):
        if file.stem != "__init__":
            assert len(file.read_text().splitlines()) < 60, file
    for method in METHODS.values():
        assert dataclasses.is_dataclass(method) and "arXiv" in method.__doc__


def test_every_method_has_the_weight_of_its_paper():
    own = {"sdi": "x0", "ism": "x0", "dds": "uniform", "diffinstruct": "x0", "dmd": "x0", "dmd2": "x0"}
    for name, method in METHODS.items():
        assert method.WEIGHT == own.get(name, "sigma2"), name
        assert objective(SCHEDULES["cosine"], name, negative="ugly").weight == method.WEIGHT
    assert objective(SCHEDULES["cosine"], "sdi", weight="sigma2").weight == "sigma2"
