"""Timestep samplers: uniform or log-normal t in a range that may change with the step, or DreamTime's schedule.

Log-normal means that ln(sigma/alpha) is normal (as in the training of Karras et al., arXiv 2206.00364), truncated to
the range. DreamTime (Huang et al., arXiv 2306.12422) is deterministic: t falls with the step, and the number of steps
spent at each level is proportional to

    W(t) = (sigma/alpha) exp(-(t - m)^2 / 2 s^2)

in Stable Diffusion's t. The t of step i of N is the one above which lies a fraction i / N of the total weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated

import torch
from torch import Tensor

from sds3d.diffusion.noise import Schedule
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import STEPS, Within

KINDS = ("uniform", "lognormal", "dreamtime")
UNITS = ("t", "ratio")


@dataclass(frozen=True)
class TimestepSampler:
    """Draws one t for each group of images.

    Args:
        t_min, t_max: the range of t. Each is a ramp over the steps, or a value that ``Ramp.parse`` accepts.
        unit: of t_min and t_max: "t" of the teacher's schedule, or "ratio" for sigma/alpha, which means the same noise
            level in every schedule.
        kind: "uniform" in t, "lognormal" in sigma/alpha, or "dreamtime".
        mean, std: of ln(sigma/alpha), for "lognormal".
        centre, width: m and s, in t of Stable Diffusion's schedule, for "dreamtime".
        steps: number of steps of the run, for "dreamtime".

    Raises:
        ValueError: an unknown kind or unit, a bound out of range, t_min above t_max at some step, or a width or std
            that is not above 0.
    """

    t_min: Annotated[Ramp, Within(0, 1e4)]
    t_max: Annotated[Ramp, Within(0, 1e4)]
    unit: str = "t"
    kind: str = "uniform"
    mean: Annotated[float, Within(-20, 20)] = -1.2
    std: Annotated[float, Within(0, 20, above=True)] = 1.2
    centre: Annotated[float, Within(-10, 10)] = 0.5
    width: Annotated[float, Within(1e-3, 10)] = 0.125
    steps: Annotated[int, Within(1, STEPS)] = 400

    def __post_init__(self):
        for name, value, known in (("kind", self.kind, KINDS), ("unit", self.unit, UNITS)):
            if value not in known:
                raise ValueError(f"time.{name} is {value!r}; give {', '.join(known[:-1])} or {known[-1]}")
        limit = 1.0 if self.unit == "t" else 1e4
        for name in ("t_min", "t_max"):
            ramp = Ramp.parse(getattr(self, name))
            object.__setattr__(self, name, ramp)
            if not (0 <= ramp.v0 <= limit and 0 <= ramp.v1 <= limit):
                accepted = "t lies in [0, 1]" if self.unit == "t" else "sigma/alpha lies in [0, 10000]"
                raise ValueError(f"{name} goes from {ramp.v0} to {ramp.v1}; {accepted}")
        corners = {edge + delta for r in (self.t_min, self.t_max) for edge in (r.start, r.end) for delta in (-1e-6, 0)}
        for step in sorted(corners):
            if self.t_min(step) > self.t_max(step):
                raise ValueError(
                    f"t_min ({self.t_min(step):g}) is above t_max ({self.t_max(step):g}) at step {max(step, 0):g}"
                )
        if not (self.std > 0 and self.width > 0 and self.steps >= 1):
            raise ValueError("time.std and time.width are above 0, and time.steps is at least 1")

    def draw(self, step: int, group: Tensor, rng: torch.Generator, schedule: Schedule) -> Tensor:
        """Return t (B,) float32 for the group indices (B,): one draw for each group, whatever the order of the batch.

        Raises:
            ValueError: a bound given as sigma/alpha is outside the schedule's range.
        """
        groups, member = torch.unique(group, return_inverse=True)
        low, high = self._bounds(step, schedule)
        if self.kind == "dreamtime":
            t = schedule.t_of_ratio(_dreamtime(self.centre, self.width, self.steps)[min(step, self.steps - 1)])
            return torch.full_like(group, float(t.clamp(low, high)), dtype=torch.float32)
        uniform = torch.rand(len(groups), generator=rng, device=rng.device).to(group.device)
        if self.kind == "uniform":
            return (low + (high - low) * uniform)[member]
        ends = torch.tensor([low, high], dtype=torch.float64, device=group.device)
        alpha, sigma = schedule.alpha_sigma(ends)
        edges = torch.special.ndtr((torch.log(sigma / alpha) - self.mean) / self.std)
        normal = torch.special.ndtri(torch.lerp(edges[0], edges[1], uniform.double()))
        ratio = torch.exp(self.mean + self.std * normal)
        return schedule.t_of_ratio(ratio).clamp(low, high).float()[member]

    def _bounds(self, step: int, schedule: Schedule) -> tuple[float, float]:
        """Return t_min and t_max at a step, in the schedule's t, at most ``schedule.t_noisiest``."""
        bounds = self.t_min(step), self.t_max(step)
        if self.unit == "ratio":
            bounds = schedule.t_of_ratio(torch.tensor(bounds, dtype=torch.float64)).tolist()
        return min(bounds[0], schedule.t_noisiest), min(bounds[1], schedule.t_noisiest)


@cache
def _dreamtime(centre: float, width: float, steps: int) -> Tensor:
    """Return sigma/alpha of every step, (steps,) float64, falling."""
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    alpha, sigma = Schedule.linear().alpha_sigma(t)
    weight = sigma / alpha * torch.exp(-((t - centre) ** 2) / (2 * width**2))
    above = weight.flip(0).cumsum(0)  # total weight above each t, from the noisiest level down
    wanted = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps * above[-1]
    t_step = t.flip(0)[torch.searchsorted(above, wanted).clamp_max(len(t) - 1)]
    alpha, sigma = Schedule.linear().alpha_sigma(t_step)
    return sigma / alpha
