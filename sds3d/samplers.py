"""Samplers: loops over a predict function that yield every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sds3d.noise import Prediction, Schedule, noised
from sds3d.transfer import onto


def ddim(
    predict: Callable[[Tensor, Tensor], Prediction],
    x_t: Tensor,
    schedule: Schedule,
    steps: int,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    t_start: float | Tensor = 1.0,
    t_end: float | Tensor = 0.0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """DDIM (Song et al., arXiv 2010.02502, eq. 12 and 16) over evenly spaced t, first order in 1 / steps.

    From t to s: ``x_s = alpha_s x0 + sqrt(sigma_s^2 - h^2) eps + h z`` with ``h = eta sigma_s sqrt(1 - q^2)``, where q
    is the smaller of r_s / r_t and r_t / r_s, and r = sigma/alpha: the paper's (16) in any schedule. eta = 0 is
    deterministic, eta = 1 is ancestral sampling (DDPM). ``t_start < t_end`` inverts; there eta = 1 is plain noising.

    Args:
        predict: (x_t (B, C, H, W), t (B,)) -> Prediction.
        x_t: (B, C, H, W) at ``t_start``: noise times sigma, where alpha is 0 there.
        generator: of the noise z, when eta > 0.
        t_start, t_end: one t for all, or (B,).

    Yields:
        t (B,) reached, the x0 predicted on the way there, and x_t there; the last t is ``t_end``.

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
    for i in range(steps):
        t, s = (torch.lerp(start, end, k / steps) for k in (i, i + 1))
        prediction = predict(x_t, t)
        x0 = prediction.x0
        alpha, sigma = schedule.alpha_sigma(t)
        alpha_s, sigma_s = schedule.alpha_sigma(s)
        if eta == 0:
            x_t = noised(x0, prediction.eps, alpha_s, sigma_s)
        else:
            ratio = sigma_s * alpha / (alpha_s * sigma)
            ratio = torch.minimum(ratio, 1 / ratio)
            fresh = eta * sigma_s * (1 - ratio**2).clamp_min(0).sqrt()  # h
            kept = (sigma_s**2 - fresh**2).clamp_min(0).sqrt()
            z = torch.randn(x_t.shape, generator=generator, dtype=dtype, device=_device(generator, x_t))
            z = onto(z, x_t.device)
            x_t = noised(noised(x0, prediction.eps, alpha_s, kept), z, torch.ones_like(fresh), fresh)
        yield s, x0, x_t


def _device(generator: torch.Generator | None, like: Tensor) -> torch.device:
    return like.device if generator is None else generator.device
