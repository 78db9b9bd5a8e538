"""The kernels of `reference` for a CPU, compiled by numba on first use and cached on disk.

`numba_kernels` holds the loops; this module makes them torch functions. The loops run on torch's number of threads. The
results do not depend on that number, bit for bit.
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
    level_rows,
    resized,
)

BLOCK = 65536  # points processed level by level: a level of the table is read into the cache once a block


@lru_cache(maxsize=64)
def _levels(spec: GridSpec, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Return the grid as the kernels read it: scales (L,), uint32 `reference.level_rows` (L, 5), lanes."""
    return torch.tensor(spec.scales, dtype=dtype).numpy(), np.array(level_rows(spec), np.uint32), (0,) * spec.features


def _flat(tensor: Tensor) -> np.ndarray:
    """Return a contiguous tensor as a flat array."""
    return tensor.view(-1).numpy()


def _share_threads() -> int:
    """Let numba use as many threads as torch does; return that number."""
    threads = torch.get_num_threads()
    most = numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]  # set when numba is imported
    numba.set_num_threads(min(threads, most))
    if torch.get_num_threads() != threads:  # numba has started the OpenMP pool, which torch may share, at full size
        torch.set_num_threads(threads)
    return threads


@cache
def _nesting_limit() -> Callable[[int], None] | None:
    """Return omp_set_max_active_levels of the OpenMP library that runs numba's loops, None if no OpenMP runs them."""
    if numba.threading_layer() != "omp":
        return None
    from numba.np.ufunc import omppool  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without a stub

    return getattr(ctypes.CDLL(omppool.__file__), "omp_set_max_active_levels", None)


def _launch(kernel: Callable, *arguments: Any) -> None:
    """Run a parallel kernel on torch's number of threads.

    numba allows nested OpenMP teams at every launch, so this forbids them again. Otherwise, if torch and numba share
    an OpenMP library, torch's attention starts a team inside each of its threads and takes 300 times as long
    (benchmarks/notes.md).
    """
    _share_threads()
    kernel(*arguments)
    limit = _nesting_limit()
    if limit is not None:
        limit(1)


class Loops:
    """`autograd.Loops` in numba."""

    def gather(self, points: Tensor, along: Tensor | None, table: Tensor, spec: GridSpec) -> Tensor:
        """See `autograd.Loops.gather`."""
        scales, levels, lanes = _levels(spec, points.dtype)
        out = torch.empty(points.shape[0], spec.width, dtype=table.dtype)
        block = max(1, min(BLOCK, -(-points.shape[0] // _share_threads())))
        direction = points.new_empty(0) if along is None else along
        arrays = (_flat(points), _flat(direction), _flat(table), scales, levels, lanes)
        _launch(numba_kernels.gather, *arrays, block, _flat(out))
        return out

    def scatter(self, points: Tensor, along: Tensor | None, grad: Tensor, spec: GridSpec) -> Tensor:
        """See `autograd.Loops.scatter`."""
        scales, levels, lanes = _levels(spec, points.dtype)
        out = torch.zeros(spec.entries, spec.features, dtype=grad.dtype)
        groups, direction = min(_share_threads(), spec.levels), points.new_empty(0) if along is None else along
        arrays = (_flat(points), _flat(direction), _flat(grad), scales, levels, lanes)
        _launch(numba_kernels.scatter, *arrays, groups, BLOCK, _flat(out))
        return out

    def point_gradient(self, points: Tensor, table: Tensor, grad: Tensor, spec: GridSpec) -> Tensor:
        """See `autograd.Loops.point_gradient`."""
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
        weights, transmittance = torch.empty_like(sigma), torch.empty_like(sigma)
        weights[used:].zero_()
        opacity, accumulated = sigma.new_empty(rays), values.new_zeros(rays, channels)
        limit, lanes = sigma.numpy().dtype.type(threshold), (0,) * channels
        inputs, outputs = (sigma, dt, values, offsets), (weights, transmittance, opacity, accumulated)
        _launch(numba_kernels.composite, *map(_flat, inputs), limit, lanes, *map(_flat, outputs))
        return weights, transmittance, opacity, accumulated

    def blend_backward(
        self,
        dt: Tensor,
        values: Tensor,
        offsets: Tensor,
        weights: Tensor,
        transmittance: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """See `autograd.Loops.blend_backward`."""
        g_sigma, g_values, used = torch.empty_like(weights), torch.empty_like(values), int(offsets[-1])
        g_sigma[used:].zero_()
        g_values[used:].zero_()
        inputs, outputs = (dt, values, offsets, weights, transmittance), (*grads, g_sigma, g_values)
        lanes = (0,) * values.shape[1]
        _launch(numba_kernels.composite_backward, *map(_flat, inputs), lanes, *map(_flat, outputs))
        return g_sigma, g_values


LOOPS = Loops()


def hash_encode(points: Tensor, table: Tensor, spec: GridSpec) -> Tensor:
    """Compute `reference.hash_encode`."""
    check_hash_encode(points, table, spec)
    return autograd.hash_encode(LOOPS, points, table.to(points.dtype), spec).to(table.dtype)


def hash_slope(points: Tensor, table: Tensor, grad: Tensor, spec: GridSpec) -> Tensor:
    """Compute `reference.hash_slope`."""
    return autograd.hash_slope(LOOPS, points, table, grad, spec)


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
    """Compute `reference.march`, sample for sample."""
    check_march(origins, directions, occupancy, step)
    rays = origins.shape[0]
    jitter = origins.new_full((rays,), 0.5) if jitter is None else jitter
    scalars = torch.tensor([step, near, far], dtype=origins.dtype).numpy()
    inputs = (*(x.contiguous().numpy() for x in (origins, directions, occupancy, jitter)), scalars)
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
    return resized(Samples(*samples, torch.full_like(samples[2], step), offsets), capacity)


def composite(
    sigma: Tensor,  # (S,)
    dt: Tensor,  # (S,)
    values: Tensor,  # (S, C)
    offsets: Tensor,  # (R + 1,)
    threshold: float = TERMINATION,
) -> Composite:
    """Compute `reference.composite`; differentiable once in sigma and values."""
    return autograd.composite(LOOPS, sigma, dt, values, offsets, threshold)
