"""Schedules against diffusers' own classes and closed forms; conversions against their definitions."""

import math

import diffusers
import numpy as np
import pytest
import torch
from conftest import SCHEDULES, every_schedule

from sds3d.diffusion.noise import KINDS, Prediction, Schedule, noised, target
from sds3d.distill.weights import WEIGHTS, weight

LEVELS = torch.tensor([0.0371, 0.138, 0.572, 1.618, 13.04], dtype=torch.float64)  # sigma/alpha


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and eps, (levels, 3, 4, 5) float64."""
    generator = seeded()
    return tuple(torch.randn(levels, 3, 4, 5, dtype=torch.float64, generator=generator) for _ in range(2))


# conversions


@every_schedule
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_every_other(schedule, kind):
    t = schedule.t_of_ratio(LEVELS)
    alpha, sigma = schedule.alpha_sigma(t)
    rates = schedule.rates(t)
    x, eps = pair(len(t))
    x_t = noised(x, eps, alpha, sigma)
    prediction = Prediction(target(kind, x, eps, alpha, sigma, rates), x_t, alpha, sigma, kind, rates)
    for wanted in KINDS:
        expected = target(wanted, x, eps, alpha, sigma, rates)
        assert (getattr(prediction, wanted) - expected).abs().max() < 1e-10 * max(1, float(expected.abs().max())), (
            wanted
        )


def test_targets_are_their_definitions():
    x, eps = pair(2)
    alpha, sigma = torch.tensor([0.6, 0.9], dtype=torch.float64), torch.tensor([0.8, 0.3], dtype=torch.float64)
    a, s = (v.view(2, 1, 1, 1) for v in (alpha, sigma))
    assert torch.equal(target("v", x, eps, alpha, sigma), a * eps - s * x)
    assert torch.equal(target("score", x, eps, alpha, sigma), -1 / s * eps)
    assert torch.equal(target("flow", x, eps, alpha, sigma), eps - x)


def test_flow_is_the_velocity_of_x_t():
    x, eps = pair(3)
    t, h = torch.tensor([0.2011, 0.5011, 0.9011], dtype=torch.float64), 1e-6
    for schedule in SCHEDULES.values():
        before, after = (noised(x, eps, *schedule.alpha_sigma(t + step)) for step in (-h, h))
        alpha, sigma = schedule.alpha_sigma(t)
        flow = target("flow", x, eps, alpha, sigma, schedule.rates(t))
        assert torch.allclose(flow, (after - before) / (2 * h), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["v", "x0", "flow"])
def test_pure_noise_has_an_x0(kind):
    """At alpha = 0, x0 through eps would be 0 / 0; straight from the output it is exact."""
    x, eps = pair(1)
    schedule = Schedule.flow() if kind == "flow" else Schedule.cosine()
    alpha, sigma = schedule.alpha_sigma(torch.ones(1, dtype=torch.float64))
    assert float(alpha) == 0
    prediction = Prediction(target(kind, x, eps, alpha, sigma), noised(x, eps, alpha, sigma), alpha, sigma, kind)
    assert torch.allclose(prediction.x0, x, atol=1e-14)
    assert torch.allclose(prediction.eps, eps, atol=1e-14)


def test_float32_near_pure_noise_keeps_x0():
    x, eps = (v.float() for v in pair(1))
    alpha, sigma = Schedule.cosine().alpha_sigma(torch.tensor([0.9999]))
    prediction = Prediction(target("v", x, eps, alpha, sigma), noised(x, eps, alpha, sigma), alpha, sigma, "v")
    assert (prediction.x0 - x).abs().max() < 1e-6


def test_half_precision_output_is_read_as_float32():
    x, eps = (v.bfloat16() for v in pair(1))
    alpha, sigma = Schedule.cosine().alpha_sigma(torch.tensor([0.5]))
    prediction = Prediction(x, eps, alpha, sigma, "v")
    assert {getattr(prediction, k).dtype for k in KINDS} == {torch.float32}


def test_selecting_samples_selects_their_answers():
    x, eps = pair(4)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    schedule = Schedule.ve()
    prediction = Prediction(x, eps, *schedule.alpha_sigma(t), "flow", schedule.rates(t))
    for index in (slice(1, 3), torch.tensor([3, 0]), t > 0.5):
        for kind in KINDS:
            assert torch.equal(getattr(prediction[index], kind), getattr(prediction, kind)[index])


def test_unknown_kind_is_refused():
    x, eps = pair(1)
    one = torch.ones(1)
    with pytest.raises(ValueError, match="velocity.*eps, x0, v, flow, score"):
        Prediction(x, eps, one, one, "velocity")
    with pytest.raises(ValueError, match="accepted"):
        target("sample", x, eps, one, one)


# conversions and schedules, as diffusers has them


@pytest.mark.parametrize(("kind", "theirs"), [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
def test_x0_as_diffusers_reads_it(kind, theirs):
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=theirs,
        clip_sample=False,
    )
    output, x_t = pair(1)
    for index in (1, 200, 500, 980):
        alpha, sigma = Schedule.linear().alpha_sigma(torch.tensor([index / 1000], dtype=torch.float64))
        x0 = scheduler.step(output, index, x_t, generator=seeded()).pred_original_sample
        # theirs holds alpha_bar in float32 as 1 - beta multiplied up, which costs a few 1e-5 in sigma
        assert torch.allclose(Prediction(output, x_t, alpha, sigma, kind).x0, x0, rtol=2e-4, atol=2e-4)


def test_velocity_and_noising_as_diffusers_does_it():
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x, eps = pair(4)
    index = torch.tensor([0, 20, 500, 999])
    alpha, sigma = Schedule.linear().alpha_sigma(index.double() / 1000)
    assert torch.allclose(noised(x, eps, alpha, sigma), scheduler.add_noise(x, eps, index), atol=1e-4)
    assert torch.allclose(target("v", x, eps, alpha, sigma), scheduler.get_velocity(x, eps, index), atol=1e-4)


def test_linear_is_stable_diffusions():
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = np.cumprod(1 - beta)
    alpha, sigma = Schedule.linear().alpha_sigma(torch.arange(1000, dtype=torch.float64) / 1000)
    assert np.abs(alpha.numpy() ** 2 - alpha_bar).max() < 1e-10
    assert np.abs(sigma.numpy() ** 2 - (1 - alpha_bar)).max() < 1e-10
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert np.abs(alpha.numpy() ** 2 - scheduler.alphas_cumprod.double().numpy()).max() < 1e-6


def test_cosine_is_diffusers_without_its_offset():
    """diffusers: alpha_bar = c(u) / c(u_0), c = cos^2, u = (t + 0.008) / 1.008, until beta reaches its cap of 0.999."""
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    t = torch.arange(1, 999, dtype=torch.float64) / 1000
    alpha = Schedule.cosine().alpha_sigma((t + 0.008) / 1.008)[0]
    first = Schedule.cosine().alpha_sigma(torch.tensor([0.008 / 1.008], dtype=torch.float64))[0]
    assert (alpha**2 / first**2 - scheduler.alphas_cumprod[:998].double()).abs().max() < 1e-6


def test_flow_is_diffusers():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    x, eps = pair(3)
    index = torch.tensor([0, 400, 900])
    t = scheduler.sigmas[index].double()
    theirs = scheduler.scale_noise(x, scheduler.timesteps[index], eps)
    assert torch.allclose(noised(x, eps, *Schedule.flow().alpha_sigma(t)), theirs.double(), atol=1e-6)


def test_ve_is_diffusers():
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=80.0, sigma_schedule="exponential")
    scheduler.set_timesteps(50)
    alpha, sigma = Schedule.ve(0.01, 80.0).alpha_sigma(torch.linspace(1, 0, 50, dtype=torch.float64))
    assert torch.allclose(sigma, scheduler.sigmas[:-1].double(), rtol=1e-5)
    assert bool((alpha == 1).all())


# schedules by themselves


@pytest.mark.parametrize(
    ("ratio", "linear", "cosine", "flow"),
    [(0.138, 0.02, 0.087, 0.121), (0.572, 0.2, 0.331, 0.364), (1.618, 0.5, 0.648, 0.618), (13.04, 0.98, 0.951, 0.929)],
)
def test_t_of_ratio_gives_the_table_of_methods(ratio, linear, cosine, flow):
    for name, expected in (("linear", linear), ("cosine", cosine), ("flow", flow)):
        assert float(SCHEDULES[name].t_of_ratio(ratio)) == pytest.approx(expected, abs=6e-4), name


@every_schedule
def test_t_of_ratio_inverts(schedule):
    t = torch.linspace(0.003, 0.997, 211, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    assert (schedule.t_of_ratio(sigma / alpha) - t).abs().max() < 1e-12
    assert bool(((sigma / alpha).diff() > 0).all())


@every_schedule
def test_rates_are_the_derivatives(schedule):
    t = torch.linspace(0.0105, 0.9905, 50, dtype=torch.float64)  # between the indices of the linear schedule
    h = 1e-6
    for rate, before, after in zip(
        schedule.rates(t), schedule.alpha_sigma(t - h), schedule.alpha_sigma(t + h), strict=True
    ):
        assert torch.allclose(rate, (after - before) / (2 * h), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_variance_is_preserved(name):
    alpha, sigma = SCHEDULES[name].alpha_sigma(torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert (alpha**2 + sigma**2 - 1).abs().max() < 1e-14


def test_levels_come_in_the_dtype_of_t():
    for schedule in SCHEDULES.values():
        for given, expected in ((torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16, torch.float32)):
            assert schedule.alpha_sigma(torch.tensor([0.5], dtype=given))[0].dtype == expected


def test_ratios_out_of_reach_are_refused():
    with pytest.raises(ValueError, match=r"100.*\[0.02, 50\]"):
        SCHEDULES["ve"].t_of_ratio(100.0)
    with pytest.raises(ValueError, match="range"):
        SCHEDULES["linear"].t_of_ratio(0.001)
    with pytest.raises(ValueError, match="range"):
        SCHEDULES["cosine"].t_of_ratio(-1.0)
    with pytest.raises(ValueError, match="sigma_min"):
        Schedule.ve(3.0, 2.0)
    assert float(SCHEDULES["flow"].t_of_ratio(math.inf)) == 1
    assert float(SCHEDULES["flow"].t_of_ratio(0.0)) == 0


# weights and draws of t


def test_weights_are_their_definitions():
    alpha, sigma = torch.tensor([0.6, 1.0]), torch.tensor([0.8, 3.0])
    assert torch.allclose(weight("sigma2", alpha, sigma), torch.tensor([0.64, 0.9]))
    assert torch.allclose(weight("x0", alpha, sigma), torch.tensor([4 / 3, 3.0]))
    assert torch.equal(weight("uniform", alpha, sigma), torch.ones(2))
    assert torch.allclose(weight("flow", alpha, sigma), torch.tensor([7 / 3, 4.0]))
    with pytest.raises(ValueError, match="dreamfusion.*sigma2, x0, uniform"):
        weight("dreamfusion", alpha, sigma)


def test_the_flow_weight_turns_an_eps_residual_into_a_velocitys():
    """Of a flow network that answers v at x_t = (1 - t) x + t eps: weight (its eps - eps) = v - (eps - x)."""
    gen = torch.Generator().manual_seed(0)
    x, eps, v = (torch.randn(5, 4, 2, 2, generator=gen, dtype=torch.float64) for _ in range(3))
    alpha, sigma = Schedule.flow().alpha_sigma(torch.tensor([0.02, 0.3, 0.5, 0.9, 0.98]).double())
    answer = Prediction(v, noised(x, eps, alpha, sigma), alpha, sigma, "flow")
    found = weight("flow", alpha, sigma).view(-1, 1, 1, 1) * (answer.eps - eps)
    assert torch.allclose(found, v - (eps - x), rtol=1e-9)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_depend_on_the_ratio_alone(name):
    values = [weight(name, *s.alpha_sigma(s.t_of_ratio(LEVELS))) for s in SCHEDULES.values()]
    for other in values[1:]:
        assert (other - values[0]).abs().max() < 1e-10


def test_a_table_is_the_scheduler_it_comes_from():
    """IF's squared cosine; at the indices alpha and sigma are the table's own, and between them nothing jumps."""
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=200)
    schedule, index = Schedule.table(scheduler.alphas_cumprod), torch.arange(200)
    alpha, sigma = schedule.alpha_sigma(index.double() / 200)
    assert torch.allclose(alpha**2, scheduler.alphas_cumprod.double(), rtol=1e-9)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(200, dtype=torch.float64), rtol=1e-12)
    t = torch.linspace(0, 1, 3001, dtype=torch.float64)
    found_alpha, found_sigma = schedule.alpha_sigma(t)
    assert ((found_sigma / found_alpha).diff() > 0).all()
    assert torch.allclose(schedule.t_of_ratio(found_sigma / found_alpha), t, atol=1e-9)


def test_a_table_may_end_in_pure_noise():
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
    alpha, sigma = Schedule.table(scheduler.alphas_cumprod).alpha_sigma(torch.tensor([0.998, 0.999, 1.0]).double())
    assert alpha[1] < 1e-8 and torch.isfinite(sigma / alpha.clamp_min(1e-12)).all() and sigma[1] == 1
    for wrong in ([0.9], [0.5, 0.9], [1.0, 0.5], [0.9, -0.1]):
        with pytest.raises(ValueError, match="fall"):
            Schedule.table(torch.tensor(wrong))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flows_shift_is_the_schedulers(shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    t = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    schedule = Schedule.flow(shift)
    alpha, sigma = schedule.alpha_sigma(t)
    assert torch.allclose(sigma, scheduler.sigmas.double(), atol=1e-6) and torch.allclose(alpha, 1 - sigma)
    assert torch.allclose(schedule.t_of_ratio(sigma / alpha), t)
    h = 1e-6
    slope = (schedule.alpha_sigma(t - h)[1] - sigma) / -h
    assert torch.allclose(schedule.rates(t)[1], slope, rtol=1e-4)
