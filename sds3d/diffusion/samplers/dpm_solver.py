"""DPM-Solver++(2M) (Lu et al., arXiv 2211.01095)."""

from __future__ import annotations

import torch
from torch import Tensor

from sds3d.diffusion.noise import Schedule, noised, per_sample
from sds3d.diffusion.samplers.levels import Level, Predict, Steps, levels_at


def dpm_solver(predict: Predict, x_t: Tensor, schedule: Schedule, times: Tensor) -> Steps:
    """Solve with DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2), second order in l = log(alpha/sigma).

        x_s = sigma_s / sigma_t x_t - alpha_s (e^-h - 1) D        with D = x0 + h / (2 h') (x0 - x0')

    h is the step in l; primes denote the previous step. The first step and a step to sigma = 0 use D = x0, which is
    first order. The arguments are those of ``heun``.
    """
    return walk(predict, x_t, levels_at(schedule, times, x_t))


def walk(predict: Predict, x_t: Tensor, levels: list[Level]) -> Steps:
    """Run ``dpm_solver`` over these levels."""
    previous: tuple[Tensor, Tensor] | None = None  # x0 and h of the previous step
    for at, to in zip(levels[:-1], levels[1:]):
        x0 = predict(x_t, at.t).x0
        if to.clean:
            x_t = per_sample(to.alpha, x0) * x0
        else:
            h = torch.log(to.alpha / to.sigma * at.sigma / at.alpha)
            ratio = torch.zeros_like(h) if previous is None else h / (2 * previous[1])
            extrapolated = x0 if previous is None else noised(x0, previous[0], 1 + ratio, -ratio)  # D
            x_t = noised(x_t, extrapolated, to.sigma / at.sigma, -to.alpha * torch.expm1(-h))
            previous = x0, h
        yield to.t, x0, x_t
