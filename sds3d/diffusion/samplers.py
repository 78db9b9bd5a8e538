"""Samplers: loops over a predict function that yield every step.

Each moves x_t along given times. ``ddpm`` adds noise on the way; the others follow the probability-flow ODE, which
in y = x_t / alpha and r = sigma / alpha is ``dy/dr = eps(x_t, t)``, the same in every schedule (Karras et al., arXiv
2206.00364, eq. 4). At t = 1, alpha may be 0 and r infinite; the first step then treats x_t as pure noise.

A `Sampler` begins at the schedule's noisiest level and ends at sigma = 0 in any schedule. If the least noisy level
still has noise (a table's index 0, VE's sigma_min), the last step goes to the x0 predicted last, as diffusers'
schedulers do with ``timestep_spacing="trailing"`` and ``final_sigmas_type="zero"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sds3d.diffusion.noise import Prediction, Schedule, noised, per_sample
from sds3d.runtime.transfer import onto

Curve = Callable[[Tensor], Tensor]  # a monotone change of variable for the spacing of noise levels
Predict = Callable[[Tensor, Tensor], Prediction]  # (x_t (B, C, H, W), t (B,)) -> Prediction
Fresh = torch.Generator | Callable[[], Tensor]  # source of fresh noise: one generator, or a function that draws it
Steps = Iterator[tuple[Tensor, Tensor, Tensor]]  # after each step: its t (B,), the x0 predicted in it, x_t at t

SAMPLERS = ("ddim", "ddpm", "heun", "dpm++")
R_MAX, R_MIN = 80.0, 0.002  # sigma/alpha where sampling begins and ends (Karras et al., table 1)


@dataclass(frozen=True)
class Sampler:
    """A sampler by name, with its number of steps.

    Args:
        name: one of SAMPLERS. "ddim" (evenly spaced t), "ddpm" (the same with fresh noise in every step), "heun"
            (EDM's, two evaluations a step except in the last), "dpm++" (DPM-Solver++(2M)).
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
        return 2 * self.steps - 1 if self.name == "heun" else self.steps

    @staticmethod
    def within(name: str, evaluations: int) -> Sampler:
        """Return the sampler of that name with the most steps that needs at most ``evaluations`` predictions."""
        return Sampler(name, (evaluations + 1) // 2 if name == "heun" else evaluations)

    def __call__(self, predict: Predict, noise: Tensor, schedule: Schedule, rng: Fresh | None = None) -> Steps:
        """Sample from noise (B, C, H, W) of standard deviation 1 down to sigma = 0; yield every step.

        The noise is first scaled by sqrt(alpha^2 + sigma^2) of the noisiest level: the standard deviation of x_t there
        for images of standard deviation 1.

        Args:
            rng: source of fresh noise, for "ddpm"; see ``ddim``.
        """
        times = {"heun": edm_times, "dpm++": log_times}.get(self.name, even_times)(schedule, self.steps)
        x_t = float(torch.hypot(*schedule.alpha_sigma(times[:1]))) * noise
        levels = _levels(schedule, times, noise, clean=True)
        if self.name == "heun":
            return _heun(predict, x_t, levels)
        if self.name == "dpm++":
            return _dpm_solver(predict, x_t, levels)
        return _ddim(predict, x_t, levels, float(self.name == "ddpm"), rng)


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
class _Level:
    """A noise level of a batch: t, alpha and sigma, each (B,), and whether sigma is 0."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    clean: bool


def _levels(schedule: Schedule, times: Tensor, like: Tensor, clean: bool = False) -> list[_Level]:
    """Return the levels at all times, on the device of ``like`` (B, C, H, W); ``clean`` appends sigma = 0 at t = 0."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    rows = torch.stack([times.double(), *schedule.alpha_sigma(times.double())], -1)
    if clean:
        rows = torch.cat([rows, rows.new_tensor([[0.0, 1.0, 0.0]])])
    is_clean = (rows[:, 2] == 0).tolist()
    rows = onto(rows.to(dtype), like.device)
    count = len(like)
    return [
        _Level(t.expand(count), alpha.expand(count), sigma.expand(count), end)
        for (t, alpha, sigma), end in zip(rows, is_clean)
    ]


def heun(predict: Predict, x_t: Tensor, schedule: Schedule, times: Tensor) -> Steps:
    """Solve dy/dr = eps with Heun's second-order steps (Karras et al., arXiv 2206.00364, algorithm 1).

    A step to sigma = 0 is an Euler step.

    Args:
        x_t: (B, C, H, W) at times[0]; sigma times normal noise if that level is nearly pure noise.
        times: (S + 1,), falling.
    """
    return _heun(predict, x_t, _levels(schedule, times, x_t))


def _heun(predict: Predict, x_t: Tensor, levels: list[_Level]) -> Steps:
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


def dpm_solver(predict: Predict, x_t: Tensor, schedule: Schedule, times: Tensor) -> Steps:
    """Solve with DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2), second order in l = log(alpha/sigma).

        x_s = sigma_s / sigma_t x_t - alpha_s (e^-h - 1) D        with D = x0 + h / (2 h') (x0 - x0')

    h is the step in l; primes denote the previous step. The first step and a step to sigma = 0 use D = x0, which is
    first order. The arguments are those of ``heun``.
    """
    return _dpm_solver(predict, x_t, _levels(schedule, times, x_t))


def _dpm_solver(predict: Predict, x_t: Tensor, levels: list[_Level]) -> Steps:
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


def ddim(
    predict: Predict,
    x_t: Tensor,
    schedule: Schedule,
    steps: int,
    eta: float = 0.0,
    rng: Fresh | None = None,
    t_start: float | Tensor = 1.0,
    t_end: float | Tensor = 0.0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Sample with DDIM (Song et al., arXiv 2010.02502, eq. 12 and 16) over evenly spaced t, first order in 1 / steps.

    A step from t to s is ``x_s = alpha_s x0 + sqrt(sigma_s^2 - h^2) eps + h z`` with ``h = eta sigma_s sqrt(1 - q^2)``.
    Here q is the smaller of r_s / r_t and r_t / r_s, and r = sigma/alpha; this is the paper's eq. 16 in any schedule.
    eta = 0 is deterministic, eta = 1 is ancestral sampling (DDPM). ``t_start < t_end`` inverts; with eta = 1 an
    inversion is plain noising.

    Args:
        predict: (x_t (B, C, H, W), t (B,)) -> Prediction.
        x_t: (B, C, H, W) at ``t_start``; sigma times normal noise if alpha is 0 there.
        rng: generator of the noise z for eta > 0, or a function that draws (B, C, H, W) at each call.
        t_start, t_end: one t for all samples, or (B,).

    Yields:
        After each step its t (B,), the x0 predicted in the step, and x_t at t. The last t is ``t_end``.

    Raises:
        ValueError: steps < 1, t outside [0, 1], eta outside [0, 1].
    """
    if steps < 1:
        raise ValueError(f"sampling needs at least 1 step, got {steps}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta lies in [0, 1], got {eta}")
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    start, end = (torch.as_tensor(v, dtype=dtype, device=x_t.device).expand(len(x_t)) for v in (t_start, t_end))
    if not x_t.is_cuda and not bool(((start >= 0) & (start <= 1) & (end >= 0) & (end <= 1)).all()):  # see transfer
        raise ValueError(f"t lies in [0, 1], got t_start {t_start} and t_end {t_end}")
    times = (torch.lerp(start, end, k / steps) for k in range(steps + 1))
    levels = [_Level(t, *schedule.alpha_sigma(t), False) for t in times]
    yield from _ddim(predict, x_t, levels, eta, rng)


def _ddim(predict: Predict, x_t: Tensor, levels: list[_Level], eta: float, rng: Fresh | None) -> Steps:
    """Run ``ddim`` over these levels."""
    for at, to in zip(levels[:-1], levels[1:]):
        prediction = predict(x_t, at.t)
        x0 = prediction.x0
        if eta == 0:
            x_t = noised(x0, prediction.eps, to.alpha, to.sigma)
        else:
            ratio = to.sigma * at.alpha / (to.alpha * at.sigma)
            ratio = torch.minimum(ratio, 1 / ratio)
            fresh = eta * to.sigma * (1 - ratio**2).clamp_min(0).sqrt()  # h
            predicted = (to.sigma**2 - fresh**2).clamp_min(0).sqrt()
            z = onto(_draw(rng, x_t).to(fresh.dtype), x_t.device)
            x_t = noised(noised(x0, prediction.eps, to.alpha, predicted), z, torch.ones_like(fresh), fresh)
        yield to.t, x0, x_t


def _draw(fresh: Fresh | None, like: Tensor) -> Tensor:
    """Draw normal noise of the shape of ``like``."""
    if callable(fresh):
        return fresh()
    device = like.device if fresh is None else fresh.device
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.randn(like.shape, generator=fresh, dtype=dtype, device=device)
