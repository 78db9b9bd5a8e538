"""DDIM against the exact solution on a Gaussian, and against diffusers' own steps."""

import math

import diffusers
import numpy as np
import pytest
import torch
from conftest import SCHEDULES, every_schedule

from sds3d.noise import Prediction, Schedule, noised
from sds3d.samplers import ddim

MEAN, STD = 0.7, 0.4


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


@every_schedule
@pytest.mark.parametrize("ends", [(0.9, 0.1), (0.1, 0.9)], ids=["sample", "invert"])
def test_ddim_is_first_order_towards_the_exact_map(schedule, ends):
    x = torch.linspace(-2, 2, 8, dtype=torch.float64).view(8, 1, 1, 1)
    counts, errors = (40, 80, 160, 320), []
    for steps in counts:
        *_, reached = last(ddim(exact(schedule), x, schedule, steps, t_start=ends[0], t_end=ends[1]))
        expected = quantile_map(x, schedule, *ends)
        errors.append(float((reached - expected).abs().max() / expected.abs().max()))
    order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert 0.9 < order < 1.1, (order, errors)
    assert errors[-1] < 0.03


def test_ddim_from_pure_noise_reaches_the_data():
    schedule = Schedule.cosine()
    noise = torch.randn(500, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, x0, x = last(ddim(exact(schedule), noise, schedule, 200))
    assert torch.equal(x0, x) and bool((t == 0).all())  # sigma is 0 there
    assert torch.allclose(x, MEAN + STD * noise, atol=0.02)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ancestral_steps_reach_the_data(eta):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(4_000, 1, 1, 1, dtype=torch.float64, generator=generator)
    schedule = Schedule.cosine()
    *_, x = last(ddim(exact(schedule), noise, schedule, 150, eta=eta, generator=generator))
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

        for s, _, x_s in ddim(knows, start, schedule, 3, eta=0.8, generator=generator, t_start=0.9, t_end=0.3):
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
    ours = ddim(predict, x, schedule, 4, eta=eta, generator=generators[0], t_start=0.8)
    x_t = x
    for index, (t, x0, reached) in zip((800, 600, 400, 200), ours, strict=True):
        step = theirs.step(network(x_t), index, x_t, eta=eta, generator=generators[1])
        x_t = step.prev_sample
        assert float(t[0]) == pytest.approx((index - 200) / 1000)
        # alpha_bar is float32 there, and sigma at index 0 is small: a few 1e-4
        assert torch.allclose(reached, x_t, atol=1e-3) and torch.allclose(x0, step.pred_original_sample, atol=1e-3)


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
    *_, reached = last(ddim(network, x, schedule, 3, eta=1.0, generator=generator, t_start=0.2, t_end=0.6))
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
