"""Draws of t against the distributions they claim."""

import math

import pytest
import torch
from conftest import SCHEDULES, every_schedule

from sds3d.diffusion.noise import Schedule
from sds3d.diffusion.timesteps import TimestepSampler
from sds3d.runtime.ramp import Ramp

COSINE = Schedule.cosine()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_one_t_a_group_whatever_the_order():
    time, group = TimestepSampler(0.1, 0.9), torch.tensor([7, 2, 7, 5, 2, 7])
    t = time.draw(0, group, seeded(3), COSINE)
    assert t[0] == t[2] == t[5] and t[1] == t[4] and len(set(t.tolist())) == 3
    order = torch.tensor([5, 3, 1, 0, 4, 2])
    assert torch.equal(time.draw(0, group[order], seeded(3), COSINE), t[order])
    assert torch.equal(time.draw(0, group, seeded(3), COSINE), t)


def test_t_is_uniform_and_follows_its_ramp():
    time, generator = TimestepSampler(0.1, Ramp(0, 0.9, 0.5, 100)), seeded()
    for step, high in ((0, 0.9), (50, 0.7), (500, 0.5)):
        t = time.draw(step, torch.arange(20_000), generator, COSINE).sort().values
        uniform = 0.1 + (high - 0.1) * (torch.arange(20_000) + 0.5) / 20_000
        assert (t - uniform).abs().max() < 0.012 * (high - 0.1)  # Kolmogorov-Smirnov, p about 0.005
        assert 0.1 <= float(t[0]) and float(t[-1]) <= high + 1e-7


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ((0.1, 1.2), "t_max.*0, 1"),
        ((-0.1, 0.5), "t_min.*0, 1"),
        ((0.6, 0.5), "above t_max"),
        ((0.6, (0, 0.9, 0.5, 100)), "above t_max.*at step 100"),
        (((50, 0.1, 0.7, 60), (40, 0.9, 0.6, 55)), "above t_max"),
    ],
)
def test_impossible_ranges_of_t_are_refused(bounds, words):
    with pytest.raises(ValueError, match=words):
        TimestepSampler(*bounds)


def ratios(schedule, t):
    alpha, sigma = schedule.alpha_sigma(t.double())
    return sigma / alpha


@every_schedule
def test_log_normal_levels_cut_off_at_the_range(schedule):
    """The empirical distribution against the truncated normal's, Kolmogorov-Smirnov at p about 0.005."""
    mean, std, low, high = 0.3, 0.9, 0.2, 4.0
    time = TimestepSampler(low, high, unit="ratio", kind="lognormal", mean=mean, std=std)
    found = ratios(schedule, time.draw(0, torch.arange(20_000), seeded(), schedule)).log().sort().values

    def share(x):
        normal, lower, upper = torch.distributions.Normal(mean, std).cdf, *torch.tensor([low, high]).log()
        return (normal(x) - normal(lower)) / (normal(upper) - normal(lower))

    assert (share(found) - (torch.arange(20_000) + 0.5) / 20_000).abs().max() < 0.012
    assert math.log(low) - 1e-4 <= float(found[0]) and float(found[-1]) <= math.log(high) + 1e-4


@pytest.mark.parametrize("unit", ["t", "ratio"])
def test_no_t_is_noisier_than_the_levels_of_a_table(unit):
    """Stable Diffusion's networks know the indices 0 to 999; t = 1 would be index 1,000."""
    schedule = Schedule.linear()
    for low in (0.9989, 1.0) if unit == "t" else (14.61, 14.7):
        time = TimestepSampler(low, 1.0 if unit == "t" else 14.7, unit=unit)
        t = time.draw(0, torch.arange(500), seeded(), schedule)
        assert 0.9989 <= float(t.min()) and float(t.max()) == pytest.approx(0.999, abs=1e-5)
        assert float(t.max()) <= 0.999 + 6e-8  # float32


@pytest.mark.parametrize("kind", ["uniform", "lognormal", "dreamtime"])
def test_ranges_by_ratio_mean_the_same_in_every_schedule(kind):
    for schedule in SCHEDULES.values():
        time = TimestepSampler(0.5, Ramp(0, 6.0, 2.0, 10), unit="ratio", kind=kind, steps=30)
        for step in (0, 5, 29):
            found = ratios(schedule, time.draw(step, torch.arange(500), seeded(), schedule))
            assert 0.5 - 1e-4 <= float(found.min()) and float(found.max()) <= time.t_max(step) + 1e-3
            assert kind == "dreamtime" or float(found.max() - found.min()) > 0.5


def test_dreamtime_falls_and_stays_at_each_level_in_proportion_to_its_weight():
    steps, schedule = 5000, Schedule.linear()
    time = TimestepSampler(0.0, 1.0, kind="dreamtime", steps=steps)
    walk = torch.stack([time.draw(i, torch.zeros(1).long(), seeded(), schedule)[0] for i in range(steps)])
    assert bool((walk[1:] <= walk[:-1]).all())
    t = (torch.arange(200) + 0.5) / 200
    weight = ratios(schedule, t) * torch.exp(-((t - 0.5) ** 2) / (2 * 0.125**2))
    for edge in (0.3, 0.5, 0.6, 0.7):
        assert float((walk >= edge).float().mean()) == pytest.approx(
            float(weight[t > edge].sum() / weight.sum()), abs=4e-3
        )


@every_schedule
def test_dreamtime_is_the_same_walk_in_every_schedule(schedule):
    time = TimestepSampler(0.0, 1.0, kind="dreamtime", steps=50)
    for step in (0, 20, 49):
        here, there = (ratios(s, time.draw(step, torch.zeros(3).long(), seeded(), s)) for s in (schedule, COSINE))
        assert here.tolist() == pytest.approx(there.tolist(), rel=1e-3)
        assert len(set(here.tolist())) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "normal"}, "time.kind.*uniform, lognormal or dreamtime"),
        ({"unit": "snr"}, "time.unit.*t or ratio"),
        ({"width": 0.0}, "above 0"),
        ({"std": -1.0}, "above 0"),
        ({"t_max": 2e4, "unit": "ratio"}, "sigma/alpha lies in"),
    ],
)
def test_what_cannot_be_drawn_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        TimestepSampler(**{"t_min": 0.1, "t_max": 0.9, **settings})
