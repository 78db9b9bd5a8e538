"""Heun's method for the probability-flow ODE (EDM, Karras et al., arXiv 2206.00364)."""

from __future__ import annotations

import torch
from torch import Tensor

from sds3d.diffusion.noise import Schedule, noised
from sds3d.diffusion.samplers.levels import Level, Predict, Steps, levels_at


def heun(predict: Predict, x_t: Tensor, schedule: Schedule, times: Tensor) -> Steps:
    """Solve dy/dr = eps with Heun's second-order steps (Karras et al., arXiv 2206.00364, algorithm 1).

    A step to sigma = 0 is an Euler step.

    Args:
        x_t: (B, C, H, W) at times[0]; sigma times normal noise if that level is nearly pure noise.
        times: (S + 1,), falling.
    """
    return walk(predict, x_t, levels_at(schedule, times, x_t))


def walk(predict: Predict, x_t: Tensor, levels: list[Level]) -> Steps:
    """Run ``heun`` over these levels."""
    for at, to in zip(levels[:-1], levels[1:]):
        first = predict(x_t, at.t)
        if to.clean:
            x0, x_t = first.x0, noised(first.x0, first.eps, to.alpha, to.sigma)
        else:
            second = predict(noised(first.x0, first.eps, to.alpha, to.sigma), to.t)
            x0, half_step = second.x0, to.alpha * (to.sigma / to.alpha - at.sigma / at.alpha) / 2
            x_t = noised(x_t, first.eps, to.alpha / at.alpha, half_step)
            x_t = noised(x_t, second.eps, torch.ones_like(half_step), half_step)
        yield to.t, x0, x_t
