"""The noise levels at which a sampler predicts, and what all samplers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sds3d.diffusion.noise import Prediction, Schedule
from sds3d.runtime.transfer import onto

Curve = Callable[[Tensor], Tensor]  # a monotone change of variable for the spacing of noise levels
Predict = Callable[[Tensor, Tensor], Prediction]  # (x_t (B, C, H, W), t (B,)) -> Prediction
Fresh = torch.Generator | Callable[[], Tensor]  # source of fresh noise: one generator, or a function that draws it
Steps = Iterator[tuple[Tensor, Tensor, Tensor]]  # after each step: its t (B,), the x0 predicted in it, x_t at t
R_MAX, R_MIN = 80.0, 0.002  # sigma/alpha where sampling begins and ends (Karras et al., table 1)


def edm_times(schedule: Schedule, steps: int, rho: float = 7.0) -> Tensor:
    """Return falling times (steps,) float64 with evenly spaced r^(1/rho) (Karras et al., arXiv 2206.00364, eq. 5).

    r = sigma/alpha goes from R_MAX to R_MIN, both clamped to the schedule's range. The final step to r = 0 is not
    among the times.
    """
    return _times(schedule, steps, lambda r: r ** (1 / rho), lambda y: y**rho)


def log_times(schedule: Schedule, steps: int) -> Tensor:
    """As ``edm_times``, with evenly spaced log r (Lu et al., arXiv 2206.00927, section 3.3)."""
    return _times(schedule, steps, torch.log, torch.exp)


def even_times(schedule: Schedule, steps: int) -> Tensor:
    """As ``edm_times``, with evenly spaced t from the noisiest level to where sigma = 0."""
    ends = torch.tensor([schedule.t_noisiest, schedule.t_clean], dtype=torch.float64)
    return torch.lerp(ends[0], ends[1], torch.arange(steps, dtype=torch.float64) / steps).clamp_min(0)


def _times(schedule: Schedule, steps: int, scale: Curve, back: Curve) -> Tensor:
    """Return times with evenly spaced scale(r); ``back`` is the inverse of ``scale``."""
    alpha, sigma = schedule.alpha_sigma(torch.tensor([0.0, schedule.t_noisiest], dtype=torch.float64))
    low, high = sigma / alpha.clamp_min(1e-12)
    ends = torch.stack([high.clamp_max(R_MAX), low.clamp_min(R_MIN)])
    fractions = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    first, last = scale(ends)
    return schedule.t_of_ratio(back(torch.lerp(first, last, fractions)).clamp(ends[1], ends[0]))


@dataclass(frozen=True)
class Level:
    """A noise level of a batch: t, alpha and sigma, each (B,), and whether sigma is 0."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    clean: bool


def levels_at(schedule: Schedule, times: Tensor, like: Tensor, clean: bool = False) -> list[Level]:
    """Return the levels at all times, on the device of ``like`` (B, C, H, W); ``clean`` appends sigma = 0 at t = 0."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    rows = torch.stack([times.double(), *schedule.alpha_sigma(times.double())], -1)
    if clean:
        rows = torch.cat([rows, rows.new_tensor([[0.0, 1.0, 0.0]])])
    is_clean = (rows[:, 2] == 0).tolist()
    rows = onto(rows.to(dtype), like.device)
    count = len(like)
    return [
        Level(t.expand(count), alpha.expand(count), sigma.expand(count), end)
        for (t, alpha, sigma), end in zip(rows, is_clean)
    ]
