"""The kernels of `reference` for a CPU, compiled by numba on first use and cached on disk.

`numba_kernels` holds the loops; here they are given to torch. The number of threads is torch's, and changes
no bit of any result.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sds3d.ops import numba_kernels
from sds3d.ops.reference import (
    PRIMES,
    TERMINATION,
    Composite,
    GridSpec,
    Samples,
    check_composite,
    check_hash_encode,
    check_march,
)

BLOCK = 65536  # points that go through one level before the next: a level of the table is read into cache once


@lru_cache(maxsize=64)
def _levels(spec: GridSpec, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """The grid as the kernels read it: scales (L,), uint32 rows (L, 5) of `_corners`, lanes."""
    rows = [
        (r, r * r, size, first, 1) if dense else (PRIMES[1], PRIMES[2], size, first, 0)
        for r, size, first, dense in zip(spec.resolutions, spec.sizes, spec.offsets, spec.dense)
    ]
    return torch.tensor(spec.scales, dtype=dtype).numpy(), np.array(rows, np.uint32), (0,) * spec.features


def _flat(tensor: Tensor) -> np.ndarray:
    """A contiguous tensor's numbers as one row, without its graph."""
    return tensor.detach().contiguous().view(-1).numpy()


def _share_threads() -> int:
    """Let numba use as many threads as torch does; returns how many."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:  # numba starts its OpenMP pool, which is torch's too, at full size
        torch.set_num_threads(threads)
    return threads


def _run_gather(points: Tensor, along: Tensor, table: Tensor, spec: GridSpec) -> Tensor:
    """Features of points (N, 3); or, with `along` (N, 3) and not empty, their change -> (N, L * F)."""
    scales, levels, lanes = _levels(spec, points.dtype)
    out = torch.empty(points.shape[0], spec.width, dtype=table.dtype)
    block = max(1, min(BLOCK, -(-points.shape[0] // _share_threads())))
    numba_kernels.gather(_flat(points), _flat(along), _flat(table), scales, levels, lanes, block, _flat(out))
    return out


def _run_scatter(points: Tensor, along: Tensor, grad: Tensor, spec: GridSpec) -> Tensor:
    """The table's gradient (entries, F), given grad (N, L * F)."""
    scales, levels, lanes = _levels(spec, points.dtype)
    out = torch.zeros(spec.entries, spec.features, dtype=grad.dtype)
    groups = min(_share_threads(), spec.levels)
    numba_kernels.scatter(_flat(points), _flat(along), _flat(grad), scales, levels, lanes, groups, BLOCK, _flat(out))
    return out


class _HashEncode(torch.autograd.Function):
    """Features of points, twice differentiable except twice in the points."""

    @staticmethod
    def forward(ctx, points: Tensor, table: Tensor, spec: GridSpec) -> Tensor:
        ctx.save_for_backward(points, table)
        ctx.spec = spec
        return _run_gather(points, points.new_empty(0), table, spec)

    @staticmethod
    def backward(ctx, grad: Tensor):
        points, table = ctx.saved_tensors
        in_points = None
        if ctx.needs_input_grad[0]:
            inside = (points >= 0) & (points <= 1)
            in_points = torch.where(inside, _PointGradient.apply(points, table, grad, ctx.spec), 0)
        in_table = _TableGradient.apply(points, grad, ctx.spec) if ctx.needs_input_grad[1] else None
        return in_points, in_table, None


class _TableGradient(torch.autograd.Function):
    """The gradient in the table (entries, F), linear in the incoming gradient."""

    @staticmethod
    def forward(ctx, points: Tensor, grad: Tensor, spec: GridSpec) -> Tensor:
        ctx.save_for_backward(points)
        ctx.spec = spec
        return _run_scatter(points, points.new_empty(0), grad, spec)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (points,) = ctx.saved_tensors
        return None, _run_gather(points, points.new_empty(0), grad, ctx.spec), None


class _PointGradient(torch.autograd.Function):
    """The gradient in the points (N, 3), differentiable in the table and the incoming gradient only."""

    @staticmethod
    def forward(ctx, points: Tensor, table: Tensor, grad: Tensor, spec: GridSpec) -> Tensor:
        ctx.save_for_backward(points, table, grad)
        ctx.spec = spec
        scales, levels, lanes = _levels(spec, points.dtype)
        out = torch.zeros(points.shape, dtype=points.dtype)
        _share_threads()
        numba_kernels.point_gradient(_flat(points), _flat(grad), _flat(table), scales, levels, lanes, _flat(out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, along: Tensor):
        points, table, grad = ctx.saved_tensors
        in_table = _run_scatter(points, along, grad, ctx.spec) if ctx.needs_input_grad[1] else None
        in_grad = _run_gather(points, along, table, ctx.spec) if ctx.needs_input_grad[2] else None
        return None, in_table, in_grad, None


def hash_encode(points: Tensor, table: Tensor, spec: GridSpec) -> Tensor:
    """As `reference.hash_encode`, in float32 or float64: (N, 3), (entries, F) -> (N, levels * F)."""
    check_hash_encode(points, table, spec)
    return _HashEncode.apply(points, table, spec)


@torch.no_grad()
def march(
    origins: Tensor,  # (R, 3)
    directions: Tensor,  # (R, 3)
    occupancy: Tensor,  # (G, G, G) bool
    step: float,
    jitter: Tensor | None = None,  # (R,)
    near: float = 0.0,
    far: float = math.inf,
    box: float = 1.0,
) -> Samples:
    """As `reference.march`, sample for sample."""
    check_march(origins, directions, occupancy, step)
    rays = origins.shape[0]
    jitter = origins.new_full((rays,), 0.5) if jitter is None else jitter
    setting = torch.tensor([step, near, far, box], dtype=origins.dtype).numpy()
    inputs = (*(x.contiguous().numpy() for x in (origins, directions, occupancy, jitter)), setting)
    offsets = torch.zeros(rays + 1, dtype=torch.int64)

    def run(ray_index: Tensor, points: Tensor, t: Tensor) -> None:
        numba_kernels.march(*inputs, offsets.numpy(), ray_index.numpy(), points.numpy(), t.numpy())

    def room(samples: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty(samples, dtype=torch.int64), origins.new_empty(samples, 3), origins.new_empty(samples)

    _share_threads()
    run(*room(0))
    offsets = offsets.cumsum(0)
    samples = room(int(offsets[-1]))
    if samples[0].numel():
        run(*samples)
    return Samples(*samples, torch.full_like(samples[2], step), offsets)


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sigma: Tensor, dt: Tensor, values: Tensor, offsets: Tensor, threshold: float):
        rays = offsets.shape[0] - 1
        sigma, dt, values, offsets = (x.detach().contiguous() for x in (sigma, dt, values, offsets))
        weights, light = torch.empty_like(sigma), torch.empty_like(sigma)
        opacity, accumulated = sigma.new_empty(rays), values.new_zeros(rays, values.shape[1])
        inputs, outputs = (sigma, dt, values, offsets), (weights, light, opacity, accumulated)
        limit = sigma.numpy().dtype.type(threshold)
        _share_threads()
        numba_kernels.composite(*(x.numpy() for x in inputs), limit, *(x.numpy() for x in outputs))
        ctx.save_for_backward(dt, values, offsets, weights, light)
        return weights, opacity, accumulated

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        dt, values, offsets, weights, light = ctx.saved_tensors
        g_sigma, g_values = torch.empty_like(weights), torch.empty_like(values)
        arrays = (dt, values, offsets, weights, light, *(g.contiguous() for g in grads), g_sigma, g_values)
        _share_threads()
        numba_kernels.composite_backward(*(x.numpy() for x in arrays))
        return g_sigma, None, g_values, None, None


def composite(
    sigma: Tensor,  # (S,)
    dt: Tensor,  # (S,)
    values: Tensor,  # (S, C)
    offsets: Tensor,  # (R + 1,)
    threshold: float = TERMINATION,
) -> Composite:
    """As `reference.composite`, differentiable once in sigma and values."""
    check_composite(sigma, dt, values, offsets)
    return Composite(*_Composite.apply(sigma, dt, values, offsets, threshold))
