"""DDIM, and with fresh noise DDPM (Song et al., arXiv 2010.02502)."""

from __future__ import annotations

import torch
from torch import Tensor

from sds3d.diffusion.noise import Schedule, noised
from sds3d.diffusion.samplers.levels import Fresh, Level, Predict, Steps
from sds3d.runtime.transfer import onto


def ddim(
    predict: Predict,
    x_t: Tensor,
    schedule: Schedule,
    steps: int,
    eta: float = 0.0,
    rng: Fresh | None = None,
    t_start: float | Tensor = 1.0,
    t_end: float | Tensor = 0.0,
) -> Steps:
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
    levels = [Level(t, *schedule.alpha_sigma(t), False) for t in times]
    yield from walk(predict, x_t, levels, eta, rng)


def walk(predict: Predict, x_t: Tensor, levels: list[Level], eta: float, rng: Fresh | None) -> Steps:
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
