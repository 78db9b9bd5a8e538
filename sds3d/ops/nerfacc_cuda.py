"""Compositing by nerfacc (arXiv 2305.04966), opt-in: its CUDA code builds itself on first use.

Marching stays with `reference`: nerfacc's restarts its steps at each occupied cell, so its samples are not
those of the definition.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sds3d.ops.reference import TERMINATION, Composite, check_composite


def check() -> None:
    """Raise ValueError where nerfacc is not installed."""
    try:
        import nerfacc  # noqa: F401
    except ImportError as error:
        raise ValueError("backend nerfacc is not installed; pip install nerfacc, or give --backend auto") from error


def composite(
    sigma: Tensor,  # (S,)
    dt: Tensor,  # (S,)
    values: Tensor,  # (S, C)
    offsets: Tensor,  # (R + 1,)
    threshold: float = TERMINATION,
) -> Composite:
    """As `reference.composite`, on CUDA."""
    import nerfacc

    check_composite(sigma, dt, values, offsets)
    rays, counts, size = offsets.shape[0] - 1, offsets.diff(), sigma.shape[0]
    packed = torch.stack([offsets[:-1], counts], -1)  # (R, 2) start and count
    ray_index = torch.repeat_interleave(torch.arange(rays, device=sigma.device), counts)
    used = ray_index.shape[0]
    sigma, dt, values = sigma[:used], dt[:used], values[:used]
    weights, light, _ = nerfacc.render_weight_from_density(torch.zeros_like(dt), dt, sigma, packed_info=packed)
    weights = torch.where(light >= threshold, weights, 0)
    opacity = nerfacc.accumulate_along_rays(weights, None, ray_index, rays)[:, 0]
    accumulated = nerfacc.accumulate_along_rays(weights, values, ray_index, rays)
    return Composite(torch.cat([weights, weights.new_zeros(size - used)]), opacity, accumulated)
