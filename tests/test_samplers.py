"""Samplers against the exact solution on a Gaussian and on a mixture, and against diffusers' own steps."""

import math

import diffusers
import numpy as np
import pytest
import torch
from conftest import SCHEDULES, every_schedule

from sds3d.diffusion.noise import Prediction, Schedule, noised
from sds3d.diffusion.samplers import SAMPLERS, Sampler
from sds3d.diffusion.samplers.ddim import ddim
from sds3d.diffusion.samplers.dpm_solver import dpm_solver
from sds3d.diffusion.samplers.heun import heun
from sds3d.diffusion.samplers.levels import edm_times, even_times, log_times
from sds3d.teachers.mixture import Mixture, MixtureTeacher

MEAN, STD = 0.7, 0.4
WEIGHTS, MODES, WIDTH = torch.tensor([0.3, 0.7]).double(), torch.tensor([-0.6, 0.8]).double(), 0.25
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}  # Schedule.linear()


def exact(schedule: Schedule):
    """The exact answer for data N(MEAN, STD^2), as v so that alpha = 0 is fine."""

    def predict(x_t, t):
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in schedule.alpha_sigma(t))
        variance = alpha**2 * STD**2 + sigma**2
        eps = sigma * (x_t - alpha * MEAN) / variance
        x0 = MEAN + alpha * STD**2 * (x_t - alpha * MEAN) / variance
        return Prediction(alpha * eps - sigma * x0, x_t, alpha.flatten(), sigma.flatten(), "v")

    return predict


def quantile_map(x, schedule: Schedule, t_from: float, t_to: float):
    """Where the probability-flow ODE takes x: a Gaussian's marginals keep the standardised value."""
    (a0, a1), (s0, s1) = schedule.alpha_sigma(torch.tensor([t_from, t_to], dtype=torch.float64))
    z = (x - a0 * MEAN) / (a0**2 * STD**2 + s0**2).sqrt()
    return a1 * MEAN + (a1**2 * STD**2 + s1**2).sqrt() * z


def last(steps):
    *_, (t, x0, x_t) = steps
    return t, x0, x_t


def below(y, ratio: float):
    """Share of the two modes' x + ratio eps that is below y (B,)."""
    return (WEIGHTS * torch.special.ndtr((y[:, None] - MODES) / math.sqrt(WIDTH**2 + ratio**2))).sum(1)


def mixture_map(y, start: float, end: float):
    """Where the ODE takes y = x_t / alpha (B,) between two ratios: in one dimension paths never cross, so the share of
    the distribution that lies below stays. By bisection, to the last bit."""
    share = below(y, start)
    low, high = torch.full_like(y, -100), torch.full_like(y, 100)
    for _ in range(64):
        middle = (low + high) / 2
        under = below(middle, end) < share
        low, high = torch.where(under, middle, low), torch.where(under, high, middle)
    return middle


def order_of(counts, errors):
    """p of error ~ 1 / steps^p, by a line through the logarithms."""
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@every_schedule
@pytest.mark.parametrize("data", ["gaussian", "two modes"])
@pytest.mark.parametrize(
    # the last count's error: 2.5 times and more what is measured (2.2e-2; 6.8e-5; 9.3e-6), the larger of both data
    ("name", "counts", "order", "most"),
    [
        ("ddim", (40, 80, 160, 320), 1, 6e-2),
        ("heun", (20, 40, 80, 160), 2, 2e-4),
        ("dpm++", (40, 80, 160, 320), 2, 3e-5),  # two points back: the order shows later than Heun's
    ],
)
def test_error_orders_are_1_2_2_towards_the_exact_map(schedule, data, name, counts, order, most):
    """From r = sigma/alpha = 10 to 0.1, which every schedule reaches: exact maps, no finer run of the same code."""
    y = torch.linspace(-15, 15, 8, dtype=torch.float64)
    ends = schedule.t_of_ratio(torch.tensor([10.0, 0.1], dtype=torch.float64))
    (first, alpha), _ = schedule.alpha_sigma(ends)
    x = (first * y).view(-1, 1, 1, 1)
    if data == "gaussian":
        predict, expected = exact(schedule), quantile_map(x, schedule, *ends)
    else:
        teacher = MixtureTeacher(Mixture(WEIGHTS, MODES.view(2, 1, 1, 1), WIDTH), schedule=schedule, kind="v")
        expected = (alpha * mixture_map(y, 10.0, 0.1)).view(-1, 1, 1, 1)

        def predict(x_t, t):
            return teacher.predict(x_t, t, [""] * len(x_t))

    errors = []
    for steps in counts:
        if name == "ddim":
            found = ddim(predict, x, schedule, steps, t_start=float(ends[0]), t_end=float(ends[1]))
        else:
            times = schedule.t_of_ratio(torch.logspace(1, -1, steps + 1, dtype=torch.float64))
            found = (heun if name == "heun" else dpm_solver)(predict, x, schedule, times)
        *_, reached = last(found)
        errors.append(float((reached - expected).abs().max() / expected.abs().max()))
    assert abs(order_of(counts, errors) - order) < 0.1, (order_of(counts, errors), errors)
    assert errors[-1] < most, errors


@every_schedule
@pytest.mark.parametrize("ends", [(0.9, 0.1), (0.1, 0.9)], ids=["sample", "invert"])
def test_ddim_is_first_order_towards_the_exact_map(schedule, ends):
    x = torch.linspace(-2, 2, 8, dtype=torch.float64).view(8, 1, 1, 1)
    counts, errors = (40, 80, 160, 320), []
    for steps in counts:
        *_, reached = last(ddim(exact(schedule), x, schedule, steps, t_start=ends[0], t_end=ends[1]))
        expected = quantile_map(x, schedule, *ends)
        errors.append(float((reached - expected).abs().max() / expected.abs().max()))
    assert 0.9 < order_of(counts, errors) < 1.1, errors
    assert errors[-1] < 0.03


def test_ddim_from_pure_noise_reaches_the_data():
    schedule = Schedule.cosine()
    noise = torch.randn(500, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, x0, x = last(ddim(exact(schedule), noise, schedule, 200))
    assert torch.equal(x0, x) and bool((t == 0).all())  # sigma is 0 there
    assert torch.allclose(x, MEAN + STD * noise, atol=0.02)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", [Schedule.cosine(), Schedule.flow(), Schedule.ve()], ids=["cosine", "flow", "ve"])
def test_every_sampler_reaches_the_data_from_pure_noise(schedule, name):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(10_000, 1, 1, 1, dtype=torch.float64, generator=generator)
    noise = (noise - noise.mean()) / noise.std()  # so that only ddpm's fresh noise leaves chance in the moments
    steps = 150 if name == "ddpm" else 40
    *_, x = last(Sampler(name, steps)(exact(schedule), noise, schedule, generator))
    # x at r = 80 lacks the mean 0.7, which leaves 0.4 * 0.7 / 80 = 0.0035 of it missing; ddpm's 10,000 samples have
    # standard errors of 0.004 (mean) and 0.003 (std). First-order samplers leave the std short by 0.013 to 0.022 here,
    # Heun 0.004 too wide and DPM-Solver++ 0.002; VE's last sigma of 0.01 adds 0.0001.
    first_order = name in ("ddim", "ddpm")
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.016 if name == "ddpm" else 0.005)
    assert float(x.std()) == pytest.approx(STD, abs=0.03 if first_order else 0.006)
    kept = float((x * noise).mean() / x.std())  # correlation with the noise it began with: all of it, or, in ddpm, none
    assert kept == pytest.approx(0 if name == "ddpm" else 1, abs=0.04)  # 10,000 samples: four standard errors


class Unit:
    """Draws noise that is 1 in one sample and 0 in the others, in another sample each time: where every step is linear,
    the samples become the coefficients of all noise that went in."""

    def __init__(self, like: torch.Tensor):
        self.drawn, self.like = 0, like

    def __call__(self) -> torch.Tensor:
        found = torch.zeros_like(self.like)
        found[self.drawn] = 1
        self.drawn += 1
        return found


def moments(name: str, steps: int, mean: float, std: float) -> tuple[float, float]:
    """Mean and standard deviation, exact, of what a sampler makes of N(mean, std^2) on Stable Diffusion's levels."""
    schedule, noise = Schedule.linear(), torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)
    teacher = MixtureTeacher(Mixture(torch.ones(1), torch.full((1, 1, 1, 1), mean), std), schedule=schedule, kind="eps")
    fresh = Unit(noise)

    def predict(x_t, t):
        assert float(t.max()) <= 0.999  # the network knows 0 to 999 of 1,000
        return teacher.predict(x_t, t, [""] * len(x_t))

    begun = fresh()
    *_, x = last(Sampler(name, steps)(predict, begun, schedule, fresh))
    (offset,) = x[-1].flatten()  # a sample that got no noise
    return float(offset), float((x[:-1] - offset).square().sum().sqrt())


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 5, 30])
def test_one_known_image_is_drawn_exactly_on_stable_diffusion_s_levels(name, steps):
    """Index 0 has a noise of 0.029, which no image keeps."""
    mean, std = moments(name, steps, MEAN, 0.0)
    assert mean == pytest.approx(MEAN, abs=1e-6) and std < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("ddim", 500), ("ddpm", 500), ("heun", 100), ("dpm++", 200)])
@pytest.mark.parametrize("std", [0.7, 1.0])
def test_a_gaussian_keeps_its_spread_on_stable_diffusion_s_levels(name, steps, std):
    """x0 at index 0 is narrower by 0.029^2 / 2 std^2 of itself. Of first-order samplers the limit of many steps."""
    found = moments(name, steps, 0.0, std)[1]
    if name in ("ddim", "ddpm"):
        found = 2 * moments(name, 2 * steps, 0.0, std)[1] - found
    assert found == pytest.approx(std, abs=1e-3)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++"])
def test_a_whole_sampler_is_diffusers_own_on_stable_diffusion_s_levels(name):
    """Their "trailing" steps begin at index 999 and end at sigma = 0."""
    steps, schedule = 10, Schedule.linear()
    network, predict = same_network(schedule)
    noise = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = log_times(schedule, steps) if name == "dpm++" else even_times(schedule, steps)
    indices = (1000 * times).round()
    if name == "dpm++":
        theirs = diffusers.DPMSolverMultistepScheduler(
            **SD, algorithm_type="dpmsolver++", solver_order=2, lower_order_final=False, use_lu_lambdas=True,
            final_sigmas_type="zero",
        )  # fmt: skip
    else:
        kind = diffusers.DDIMScheduler if name == "ddim" else diffusers.DDPMScheduler
        theirs = kind(**SD, clip_sample=False, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    if name != "dpm++":
        assert theirs.timesteps.tolist() == indices.tolist() == [*range(999, 0, -100)]
    x_t = float(theirs.init_noise_sigma) * noise
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    ours = Sampler(name, steps)(predict, noise, schedule, generators[0])
    more = {"generator": generators[1]} if name == "ddpm" else {}
    for index, (_, _, reached) in zip(theirs.timesteps, ours, strict=True):
        x_t = theirs.step(network(x_t), index, x_t, **more).prev_sample
        # alpha_bar is float32 there
        assert torch.allclose(reached, x_t, atol=2e-3), float((reached - x_t).abs().max())


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_sampler_asks_as_often_as_it_says(name, steps):
    for schedule in (Schedule.cosine(), Schedule.flow(), Schedule.ve(), Schedule.linear()):
        asked = []

        def predict(x_t, t, schedule=schedule, asked=asked):
            asked.append(t)
            return exact(schedule)(x_t, t)

        sampler = Sampler(name, steps)
        found = list(sampler(predict, torch.zeros(1, 1, 1, 1, dtype=torch.float64), schedule, torch.Generator()))
        assert len(found) == steps
        assert len(asked) == sampler.evaluations, (schedule, name)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_within_a_budget_uses_it_and_no_more(name):
    for budget in (1, 2, 4, 8, 18, 35):
        sampler = Sampler.within(name, budget)
        assert budget - (name == "heun") <= sampler.evaluations <= budget
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        Sampler.within(name, 0)


@every_schedule
@pytest.mark.parametrize("spacing", [edm_times, log_times, even_times])
def test_times_fall_from_the_noisiest_level_that_networks_know(schedule, spacing):
    """Of Stable Diffusion's 1,000 levels that is index 999, of the known sigma/alpha 14.6146."""
    noisiest = {"_Cosine": 80, "_Flow": 80, "_VE": 50, "_Table": 14.6146}[type(schedule).__name__]
    for steps in (1, 2, 18, 2000):
        times = spacing(schedule, steps)
        assert len(times) == steps and bool((times.diff() <= 0).all())
        assert float(times[-1]) >= 0 and float(times[0]) <= schedule.t_noisiest + 1e-12
        alpha, sigma = schedule.alpha_sigma(times)
        if spacing is even_times:
            assert float(times[0]) == schedule.t_noisiest
        else:
            assert float(sigma[0] / alpha[0]) == pytest.approx(noisiest, rel=1e-5)


def test_edm_times_are_those_of_diffusers():
    """Karras et al., eq. 5; float32 there."""
    theirs = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0)
    for steps in (2, 5, 18):
        theirs.set_timesteps(steps)
        for schedule in (Schedule.cosine(), Schedule.flow()):
            alpha, sigma = schedule.alpha_sigma(edm_times(schedule, steps))
            assert torch.allclose((sigma / alpha).float(), theirs.sigmas[:-1], rtol=1e-5, atol=1e-9)
            assert float(theirs.sigmas[-1]) == 0  # where the last step goes in ours, too


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_steps_reach_the_data(eta):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(4_000, 1, 1, 1, dtype=torch.float64, generator=generator)
    schedule = Schedule.cosine()
    *_, x = last(ddim(exact(schedule), noise, schedule, 150, eta=eta, rng=generator))
    # 4,000 samples: standard errors 0.006 (mean) and 0.005 (std); 150 steps leave the std 3 % short
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x.std()) == pytest.approx(STD, abs=0.022)


def test_every_step_has_the_right_marginal_variance():
    """With the exact x0 handed in, x_s must be N(alpha_s x, sigma_s^2), for any eta and schedule."""
    x = torch.full((8_000, 1, 1, 1), 0.3, dtype=torch.float64)
    for name, schedule in SCHEDULES.items():
        generator = torch.Generator().manual_seed(2)
        t = torch.full((len(x),), 0.9, dtype=torch.float64)
        start = noised(x, torch.randn(x.shape, dtype=torch.float64, generator=generator), *schedule.alpha_sigma(t))

        def knows(x_t, t, schedule=schedule):
            return Prediction(x, x_t, *schedule.alpha_sigma(t), "x0")

        for s, _, x_s in ddim(knows, start, schedule, 3, eta=0.8, rng=generator, t_start=0.9, t_end=0.3):
            alpha, sigma = (float(v[0]) for v in schedule.alpha_sigma(s))
            assert float(x_s.std()) == pytest.approx(sigma, rel=0.03), name
            assert abs(float(x_s.mean()) - alpha * 0.3) < 5 * sigma / math.sqrt(len(x)), name


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_steps_as_diffusers_does(eta):
    theirs = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
    )
    theirs.set_timesteps(5)  # 800, 600, 400, 200, 0: the first four steps end at index 0, our t = 0
    assert theirs.timesteps.tolist() == [800, 600, 400, 200, 0]
    schedule = Schedule.linear()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def network(x_t):
        return torch.tanh(x_t) * 0.9

    def predict(x_t, t):
        return Prediction(network(x_t), x_t, *schedule.alpha_sigma(t), "eps")

    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    ours = ddim(predict, x, schedule, 4, eta=eta, rng=generators[0], t_start=0.8)
    x_t = x
    for index, (t, x0, reached) in zip((800, 600, 400, 200), ours, strict=True):
        step = theirs.step(network(x_t), index, x_t, eta=eta, generator=generators[1])
        x_t = step.prev_sample
        assert float(t[0]) == pytest.approx((index - 200) / 1000)
        # alpha_bar is float32 there, and sigma at index 0 is small: a few 1e-4
        assert torch.allclose(reached, x_t, atol=1e-3) and torch.allclose(x0, step.pred_original_sample, atol=1e-3)


def same_network(schedule: Schedule):
    """A network that looks at x_t alone, so that nobody's way to tell it the time matters; what it says, and as eps."""

    def network(x_t):
        return torch.tanh(2 * x_t) * 0.9

    return network, lambda x_t, t: Prediction(network(x_t), x_t, *schedule.alpha_sigma(t), "eps")


def test_dpm_solver_steps_as_diffusers_does():
    """Over times chosen unevenly, so that the ratio of two steps counts, and to the same last level: index 0, t = 0."""
    theirs = diffusers.DPMSolverMultistepScheduler(
        **SD, algorithm_type="dpmsolver++", solver_order=2, lower_order_final=False, final_sigmas_type="sigma_min"
    )
    indices = [990, 600, 400, 250, 130, 50, 7]
    theirs.set_timesteps(timesteps=indices)
    schedule = Schedule.linear()
    network, predict = same_network(schedule)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t, times = x, torch.tensor([*indices, 0], dtype=torch.float64) / 1000
    for index, (t, _, reached) in zip(theirs.timesteps, dpm_solver(predict, x, schedule, times), strict=True):
        x_t = theirs.step(network(x_t), index, x_t).prev_sample
        # betas and levels are float32 there: sigma at index 0, 0.03, is off by 1e-4 of itself
        assert torch.allclose(reached, x_t, atol=1e-4), (float(t[0]), float((reached - x_t).abs().max()))
    assert float(t[0]) == 0


@pytest.mark.parametrize("karras", [False, True], ids=["given times", "karras"])
def test_heun_steps_as_diffusers_does(karras):
    """In y = x_t / alpha, where theirs lives; its last step is to sigma = 0, which Schedule.linear() does not have."""
    theirs = diffusers.HeunDiscreteScheduler(**SD, use_karras_sigmas=karras)
    given = {"num_inference_steps": 6} if karras else {"timesteps": [900, 600, 400, 250, 130, 50]}
    theirs.set_timesteps(**given)
    schedule, levels = Schedule.linear(), theirs.sigmas.double().unique().flip(0)  # each but the ends is there twice
    network, predict = same_network(schedule)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = schedule.t_of_ratio(levels[:-1])
    alpha, _ = schedule.alpha_sigma(times)
    y = x / alpha[0]
    ask = iter(theirs.timesteps)
    for scale, (_, _, reached) in zip(alpha[1:], heun(predict, x, schedule, times), strict=True):
        for _ in range(2):
            index = next(ask)
            y = theirs.step(network(theirs.scale_model_input(y, index)), index, y).prev_sample
        # levels are handed over as float32, 6e-8 of themselves; both then compute in float64
        assert torch.allclose(reached / scale, y, atol=1e-5), float((reached / scale - y).abs().max())


def test_a_ddpm_step_has_diffusers_posterior():
    """Mean and variance of x_s given x_t: two draws of ours tell both, as both know z."""
    theirs = diffusers.DDPMScheduler(**SD, clip_sample=False)
    theirs.set_timesteps(5)
    schedule = Schedule.linear()
    network, predict = same_network(schedule)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for index in (800, 600, 400):
        seeds, found = (5, 6), []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            ends = {"t_start": index / 1000, "t_end": (index - 200) / 1000}
            *_, reached = last(ddim(predict, x, schedule, 1, eta=1.0, rng=generator, **ends))
            found.append(reached)
        z = [torch.randn(x.shape, generator=torch.Generator().manual_seed(s), dtype=x.dtype) for s in seeds]
        spread = (found[0] - found[1]) / (z[0] - z[1])
        step = theirs.step(network(x), index, x, generator=torch.Generator().manual_seed(seeds[0]))
        deviation = float(theirs._get_variance(index)) ** 0.5
        # alpha_bar is float32 there: 1e-5 of it at these indices
        assert torch.allclose(spread, torch.full_like(x, deviation), atol=1e-4)
        assert torch.allclose(found[0] - spread * z[0], step.prev_sample - deviation * z[0], atol=1e-4)


def test_flow_steps_as_diffusers_does():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    schedule = Schedule.flow()
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def predict(x_t, t):
        return Prediction(torch.sin(x_t), x_t, *schedule.alpha_sigma(t), "flow")

    x_t = x
    for timestep, (_, _, reached) in zip(theirs.timesteps, ddim(predict, x, schedule, 4), strict=True):
        x_t = theirs.step(torch.sin(x_t), timestep, x_t).prev_sample
        assert torch.allclose(reached, x_t, atol=1e-5)


@every_schedule
def test_inversion_at_eta_1_is_plain_noising(schedule):
    """Whatever the network says: alpha_s x0 + kept eps is then alpha_s / alpha_t x_t."""
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(
        4_000, -1, -1, -1
    )

    def network(x_t, t):
        return Prediction(torch.sin(3 * x_t), x_t, *schedule.alpha_sigma(t), "eps")

    generator = torch.Generator().manual_seed(1)
    *_, reached = last(ddim(network, x, schedule, 3, eta=1.0, rng=generator, t_start=0.2, t_end=0.6))
    (a0, a1), (s0, s1) = schedule.alpha_sigma(torch.tensor([0.2, 0.6], dtype=torch.float64))
    fresh = float((s1**2 - (a1 / a0 * s0) ** 2).sqrt())
    assert float((reached.mean(0) - a1 / a0 * x[0]).abs().max()) < 5 * fresh / math.sqrt(4_000)
    assert float(reached.std(0).mean()) == pytest.approx(fresh, rel=0.01)


def test_every_sample_may_have_its_own_times():
    schedule = Schedule.cosine()
    x = torch.linspace(-2, 2, 3, dtype=torch.float64).view(3, 1, 1, 1)
    ends = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    t, _, together = last(ddim(exact(schedule), x, schedule, 7, t_start=0.05, t_end=ends))
    assert torch.allclose(t, ends)
    for i in range(3):
        *_, alone = last(ddim(exact(schedule), x[i : i + 1], schedule, 7, t_start=0.05, t_end=float(ends[i])))
        assert torch.allclose(together[i : i + 1], alone, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "at least 1 step, got 0"),
        ({"t_start": 1.5}, "1.5"),
        ({"eta": 2.0}, "eta"),
    ],
)
def test_bad_settings_are_refused(change, words):
    schedule = Schedule.cosine()
    with pytest.raises(ValueError, match=words):
        next(ddim(exact(schedule), torch.zeros(1, 1, 1, 1), schedule, **{"steps": 4, **change}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "euler"}, "sampler is 'euler'; give ddim, ddpm, heun, dpm\\+\\+"),
        ({"steps": 0}, "at least 1 step, got 0"),
        ({"name": "heun", "steps": -2}, "at least 1 step, got -2"),
    ],
)
def test_bad_samplers_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Sampler(**change)
