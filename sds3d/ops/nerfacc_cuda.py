"""Marching and compositing by nerfacc (arXiv 2305.04966). Opt-in: nerfacc compiles its CUDA code on first use.

nerfacc advances by whole steps from a ray's near plane, through empty cells too. It keeps a sample if the middle,
near + (k + 1/2) step, lies in an occupied cell. So a near plane of start + (jitter - 1/2) step gives the samples of
`reference.march`. nerfacc sums steps in float32 and finds cells by their borders, so the two may differ in samples that
lie within rounding of a border. The number of samples is read back from the GPU, so the host waits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sds3d.ops.reference import TERMINATION, Composite, Samples, box_interval, check_composite, check_march, resized


def check() -> None:
    """Raise ValueError if nerfacc is not installed."""
    try:
        import nerfacc  # noqa: F401
    except ImportError as error:
        raise ValueError("backend nerfacc is not installed; pip install nerfacc, or give --backend auto") from error


@torch.no_grad()
def march(
    origins: Tensor,  # (R, 3)
    directions: Tensor,  # (R, 3)
    occupancy: Tensor,  # (G, G, G) bool
    step: float,
    jitter: Tensor | None = None,  # (R,)
    near: float = 0.0,
    far: float = math.inf,
    capacity: int | None = None,
) -> Samples:
    """Compute `reference.march`, up to rounding at the borders of cells."""
    import nerfacc

    check_march(origins, directions, occupancy, step)
    rays, device = origins.shape[0], origins.device
    jitter = origins.new_full((rays,), 0.5) if jitter is None else jitter
    enter, leave = box_interval(origins, directions)
    start, stop = enter.clamp(min=near), leave.clamp(max=far)
    hit = (stop > start) & torch.isfinite(start) & torch.isfinite(stop)
    start, stop = torch.where(hit, start, 0), torch.where(hit, stop, 0)
    index, distance = torch.zeros(0, dtype=torch.int64, device=device), origins.new_zeros(0)
    if rays:  # nerfacc launches one thread a ray, and CUDA refuses a launch without threads
        first, box = start + (jitter - 0.5) * step, [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0]
        _, middles, _ = nerfacc.traverse_grids(
            origins.float(),
            directions.float(),
            occupancy[None],
            torch.tensor([box], device=device),
            near_planes=first.float(),
            far_planes=stop.float(),
            step_size=step,
            t_sorted=torch.stack([start, stop], -1).float(),
            t_indices=torch.arange(2, device=device).repeat(rays, 1),
            hits=hit[:, None],
        )
        assert middles.ray_indices is not None, "nerfacc returns the rays of packed samples"
        index = middles.ray_indices
        steps = ((middles.vals.to(origins.dtype) - start[index]) / step - jitter[index]).round()
        distance = (steps + jitter[index]) * step  # rounded as in reference.march
    t = start[index] + distance
    points = origins[index] + t[:, None] * directions[index]
    ends = torch.bincount(index, minlength=rays).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])
    return resized(Samples(index, points, t, torch.full_like(t, step), offsets), capacity)


def composite(
    sigma: Tensor,  # (S,)
    dt: Tensor,  # (S,)
    values: Tensor,  # (S, C)
    offsets: Tensor,  # (R + 1,)
    threshold: float = TERMINATION,
) -> Composite:
    """Compute `reference.composite`, on CUDA."""
    import nerfacc

    check_composite(sigma, dt, values, offsets)
    rays, counts, size = offsets.shape[0] - 1, offsets.diff(), sigma.shape[0]
    packed = torch.stack([offsets[:-1], counts], -1)  # (R, 2) start and count
    ray_index = torch.repeat_interleave(torch.arange(rays, device=sigma.device), counts)
    used = ray_index.shape[0]
    sigma, dt, values = sigma[:used], dt[:used], values[:used]
    weights, transmittance, _ = nerfacc.render_weight_from_density(torch.zeros_like(dt), dt, sigma, packed_info=packed)
    weights = torch.where(transmittance >= threshold, weights, 0)
    opacity = nerfacc.accumulate_along_rays(weights, None, ray_index, rays)[:, 0]
    accumulated = nerfacc.accumulate_along_rays(weights, values, ray_index, rays)
    return Composite(torch.cat([weights, weights.new_zeros(size - used)]), opacity, accumulated)
