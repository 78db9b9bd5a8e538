"""Samplers: loops over a predict function that yield every step.

Each moves x_t along given times. ``ddpm`` adds noise on the way; the others follow the probability-flow ODE, which
in y = x_t / alpha and r = sigma / alpha is ``dy/dr = eps(x_t, t)``, the same in every schedule (Karras et al., arXiv
2206.00364, eq. 4). At t = 1, alpha may be 0 and r infinite; the first step then treats x_t as pure noise.

A `Sampler` begins at the schedule's noisiest level and ends at sigma = 0 in any schedule. If the least noisy level
still has noise (a table's index 0, VE's sigma_min), the last step goes to the x0 predicted last, as diffusers'
schedulers do with ``timestep_spacing="trailing"`` and ``final_sigmas_type="zero"``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sds3d.diffusion.noise import Schedule
from sds3d.diffusion.samplers import ddim, dpm_solver, heun
from sds3d.diffusion.samplers.levels import Fresh, Level, Predict, Steps, edm_times, even_times, levels_at, log_times


@dataclass(frozen=True)
class Algorithm:
    """What a sampler's name stands for.

    Args:
        times: (schedule, steps) -> the times (steps,) of its steps, falling; the last step goes to sigma = 0.
        walk: (predict, x_t, levels, source of fresh noise) -> its steps.
        extra: predictions that each step but the last makes beyond the first.
        stochastic: whether it draws fresh noise.
    """

    times: Callable[[Schedule, int], Tensor]
    walk: Callable[[Predict, Tensor, list[Level], Fresh | None], Steps]
    extra: int = 0
    stochastic: bool = False


SAMPLERS = {
    "ddim": Algorithm(even_times, lambda predict, x_t, levels, rng: ddim.walk(predict, x_t, levels, 0.0, rng)),
    "ddpm": Algorithm(
        even_times, lambda predict, x_t, levels, rng: ddim.walk(predict, x_t, levels, 1.0, rng), stochastic=True
    ),
    "heun": Algorithm(edm_times, lambda predict, x_t, levels, rng: heun.walk(predict, x_t, levels), extra=1),
    "dpm++": Algorithm(log_times, lambda predict, x_t, levels, rng: dpm_solver.walk(predict, x_t, levels)),
}


@dataclass(frozen=True)
class Sampler:
    """A sampler by name, with its number of steps.

    Args:
        name: a key of SAMPLERS: "ddim" (evenly spaced t), "ddpm" (the same with fresh noise in every step), "heun"
            (EDM's, two evaluations a step except in the last) or "dpm++" (DPM-Solver++(2M)).
        steps: number of steps.

    Raises:
        ValueError: the name is unknown, or steps is below 1.
    """

    name: str = "ddim"
    steps: int = 30

    def __post_init__(self):
        if self.name not in SAMPLERS:
            raise ValueError(f"sampler is {self.name!r}; give {', '.join(SAMPLERS)}")
        if self.steps < 1:
            raise ValueError(f"sampling needs at least 1 step, got {self.steps}")

    @property
    def evaluations(self) -> int:
        """Number of predictions."""
        return self.steps + SAMPLERS[self.name].extra * (self.steps - 1)

    @staticmethod
    def within(name: str, evaluations: int) -> Sampler:
        """Return the sampler of that name with the most steps that needs at most ``evaluations`` predictions."""
        extra = SAMPLERS[name].extra
        return Sampler(name, (evaluations + extra) // (1 + extra))

    def __call__(self, predict: Predict, noise: Tensor, schedule: Schedule, rng: Fresh | None = None) -> Steps:
        """Sample from noise (B, C, H, W) of standard deviation 1 down to sigma = 0; yield every step.

        The noise is first scaled by sqrt(alpha^2 + sigma^2) of the noisiest level: the standard deviation of x_t there
        for images of standard deviation 1.

        Args:
            rng: source of fresh noise, for a stochastic sampler; see `ddim.ddim`.
        """
        algorithm = SAMPLERS[self.name]
        times = algorithm.times(schedule, self.steps)
        x_t = float(torch.hypot(*schedule.alpha_sigma(times[:1]))) * noise
        return algorithm.walk(predict, x_t, levels_at(schedule, times, noise, clean=True), rng)
