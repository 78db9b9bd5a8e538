"""The kernels of `reference` for a CPU, compiled by numba on first use and cached on disk.

`numba_kernels` holds the loops; here they are given to torch. The number of threads is torch's, and changes
no bit of any result.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from sds3d.ops import autograd, numba_kernels
from sds3d.ops.reference import (
    TERMINATION,
    Composite,
    GridSpec,
    Samples,
    check_hash_encode,
    check_march,
    fitted,
    level_rows,
)

BLOCK = 65536  # points that go through one level before the next: a level of the table is read into cache once


@lru_cache(maxsize=64)
def _levels(spec: GridSpec, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """The grid as the kernels read it: scales (L,), uint32 `reference.level_rows` (L, 5), lanes."""
    return torch.tensor(spec.scales, dtype=dtype).numpy(), np.array(level_rows(spec), np.uint32), (0,) * spec.features


def _flat(tensor: Tensor) -> np.ndarray:
    """A contiguous tensor's numbers as one row."""
    return tensor.view(-1).numpy()


def _share_threads() -> int:
    """Let numba use as many threads as torch does; returns how many."""
    threads = torch.get_num_threads()
    most = numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]  # set when numba is imported
    numba.set_num_threads(min(threads, most))
    if torch.get_num_threads() != threads:  # numba starts its OpenMP pool, which is torch's too, at full size
        torch.set_num_threads(threads)
    return threads


@cache
def _nesting_limit() -> Callable[[int], None] | None:
    """OpenMP's omp_set_max_active_levels, of the library that runs numba's loops; None where no such library does."""
    if numba.threading_layer() != "omp":
        return None
    from numba.np.ufunc import omppool  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without a stub

    return getattr(ctypes.CDLL(omppool.__file__), "omp_set_max_active_levels", None)


def _launch(kernel: Callable, *arguments: Any) -> None:
    """Run a parallel kernel on torch's number of threads.

    numba allows nested teams of threads at every launch. Where torch shares its OpenMP library, torch's attention
    would then start a team inside each of its own threads, and take 300 times as long (benchmarks/notes.md).
    """
    _share_threads()
    kernel(*arguments)
    limit = _nesting_limit()
    if limit is not None:
        limit(1)


class Loops:
    """`autograd.Loops` in numba."""

    def gather(self, points: Tensor, along: Tensor | None, table: Tensor, spec: GridSpec) -> Tensor:
        """Features (N, L * F), or their change."""
        scales, levels, lanes = _levels(spec, points.dtype)
        out = torch.empty(points.shape[0], spec.width, dtype=table.dtype)
        block = max(1, min(BLOCK, -(-points.shape[0] // _share_threads())))
        moving = points.new_empty(0) if along is None else along
        arrays = (_flat(points), _flat(moving), _flat(table), scales, levels, lanes)
        _launch(numba_kernels.gather, *arrays, block, _flat(out))
        return out

    def scatter(self, points: Tensor, along: Tensor | None, grad: Tensor, spec: GridSpec) -> Tensor:
        """The table's gradient (entries, F)."""
        scales, levels, lanes = _levels(spec, points.dtype)
        out = torch.zeros(spec.entries, spec.features, dtype=grad.dtype)
        groups, moving = min(_share_threads(), spec.levels), points.new_empty(0) if along is None else along
        arrays = (_flat(points), _flat(moving), _flat(grad), scales, levels, lanes)
        _launch(numba_kernels.scatter, *arrays, groups, BLOCK, _flat(out))
        return out

    def point_gradient(self, points: Tensor, table: Tensor, grad: Tensor, spec: GridSpec) -> Tensor:
        """The points' gradient (N, 3)."""
        scales, levels, lanes = _levels(spec, points.dtype)
        out = torch.zeros(points.shape, dtype=points.dtype)
        arrays = (_flat(points), _flat(grad), _flat(table), scales, levels, lanes)
        _launch(numba_kernels.point_gradient, *arrays, _flat(out))
        return out

    def blend(
        self, sigma: Tensor, dt: Tensor, values: Tensor, offsets: Tensor, threshold: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `autograd.Loops.blend`."""
        rays, channels, used = offsets.shape[0] - 1, values.shape[1], int(offsets[-1])
        weights, light = torch.empty_like(sigma), torch.empty_like(sigma)
        weights[used:].zero_()
        opacity, accumulated = sigma.new_empty(rays), values.new_zeros(rays, channels)
        limit, lanes = sigma.numpy().dtype.type(threshold), (0,) * channels
        inputs, outputs = (sigma, dt, values, offsets), (weights, light, opacity, accumulated)
        _launch(numba_kernels.composite, *map(_flat, inputs), limit, lanes, *map(_flat, outputs))
        return weights, light, opacity, accumulated

    def blend_backward(
        self,
        dt: Tensor,
        values: Tensor,
        offsets: Tensor,
        weights: Tensor,
        light: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """See `autograd.Loops.blend_backward`."""
        g_sigma, g_values, used = torch.empty_like(weights), torch.empty_like(values), int(offsets[-1])
        g_sigma[used:].zero_()
        g_values[used:].zero_()
        inputs, outputs = (dt, values, offsets, weights, light), (*grads, g_sigma, g_values)
        lanes = (0,) * values.shape[1]
        _launch(numba_kernels.composite_backward, *map(_flat, inputs), lanes, *map(_flat, outputs))
        return g_sigma, g_values


LOOPS = Loops()


def hash_encode(points: Tensor, table: Tensor, spec: GridSpec) -> Tensor:
    """As `reference.hash_encode`."""
    check_hash_encode(points, table, spec)
    return autograd.hash_encode(LOOPS, points, table.to(points.dtype), spec).to(table.dtype)


@torch.no_grad()
def march(
    origins: Tensor,  # (R, 3)
    directions: Tensor,  # (R, 3)
    occupancy: Tensor,  # (G, G, G) bool
    step: float,
    jitter: Tensor | None = None,  # (R,)
    near: float = 0.0,
    far: float = math.inf,
    room: int | None = None,
) -> Samples:
    """As `reference.march`, sample for sample."""
    check_march(origins, directions, occupancy, step)
    rays = origins.shape[0]
    jitter = origins.new_full((rays,), 0.5) if jitter is None else jitter
    setting = torch.tensor([step, near, far], dtype=origins.dtype).numpy()
    inputs = (*(x.contiguous().numpy() for x in (origins, directions, occupancy, jitter)), setting)
    offsets = torch.zeros(rays + 1, dtype=torch.int64)

    def run(ray_index: Tensor, points: Tensor, t: Tensor) -> None:
        outputs = (offsets, ray_index, points, t)
        _launch(numba_kernels.march, *inputs, *(x.numpy() for x in outputs))

    def empty(samples: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty(samples, dtype=torch.int64), origins.new_empty(samples, 3), origins.new_empty(samples)

    run(*empty(0))
    offsets = offsets.cumsum(0)
    samples = empty(int(offsets[-1]))
    if samples[0].numel():
        run(*samples)
    return fitted(Samples(*samples, torch.full_like(samples[2], step), offsets), room)


def composite(
    sigma: Tensor,  # (S,)
    dt: Tensor,  # (S,)
    values: Tensor,  # (S, C)
    offsets: Tensor,  # (R + 1,)
    threshold: float = TERMINATION,
) -> Composite:
    """As `reference.composite`, differentiable once in sigma and values."""
    return autograd.composite(LOOPS, sigma, dt, values, offsets, threshold)
