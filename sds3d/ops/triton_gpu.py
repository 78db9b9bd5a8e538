"""The kernels of `reference` for a GPU, in Triton. Nothing is built at install; Triton calls gcc or clang once.

Hash encoding: a program encodes a block of points at one level, so that the level's entries stay in the cache. The
table's gradient is summed by atomics: in float32, or, if a run must be reproducible, in 64-bit fixed point, whose sums
do not depend on the order. Marching: a lane marches one ray twice; it first counts the samples, then writes them.
Compositing: a program composites one ray, a block of samples at a time, and stops when the transmittance is below the
threshold.

Half-precision tables are read as they are and converted to float32. If TRITON_INTERPRET=1 is set before this module is
imported, everything runs on a CPU, slowly; the tests use that.
"""

# Triton's stubs declare kernels as plain functions: they do not know a launch's further arguments, nor that its
# constants are plain numbers.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math
import subprocess
from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from sds3d.ops import autograd, triton_kernels
from sds3d.ops.reference import TERMINATION, Composite, GridSpec, Samples, check_march, level_rows

POINTS = 256  # in a program of the encoding
RAYS = 128  # in a program of the march
SAMPLES = 64  # in a block of compositing
SUM_BITS = 60  # of a fixed-point sum
# No compiler, a missing header, a library that does not load, no driver, an assembler error:
FAILURES = (RuntimeError, subprocess.SubprocessError, OSError, ImportError, AssertionError, TritonError)


@lru_cache(maxsize=8)
def launch_error(device: torch.device) -> str:
    """Launch the smallest kernel, once a process, and return the error; "" if it runs."""
    try:
        triton_kernels.touch[(1,)](torch.empty(1, device=device))
    except FAILURES as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


@lru_cache(maxsize=64)
def _grid(spec: GridSpec, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the grid as the kernels read it: scales (L,), `reference.level_rows` (L, 5)."""
    return torch.tensor(spec.scales, dtype=dtype, device=device), torch.tensor(level_rows(spec), device=device)


@lru_cache(maxsize=64)
def _numbers(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers that kernels read in the data's dtype (an argument would be float32); copied to the GPU once."""
    return torch.tensor(values, dtype=dtype, device=device)


def _power(count: int) -> int:
    """Return the next power of two, which Triton requires as a block's width."""
    return triton.next_power_of_2(max(count, 1))


def _launch(points: Tensor, spec: GridSpec) -> tuple[tuple[int, int], tuple[Tensor, Tensor], dict[str, int]]:
    """Return the launch grid, the hash grid's tensors and the constants of an encoding kernel."""
    constants = {"F": spec.features, "FP": _power(spec.features), "BLOCK": POINTS, "enable_fp_fusion": True}
    return (triton.cdiv(len(points), POINTS), spec.levels), _grid(spec, points.dtype, points.device), constants


class Loops:
    """`autograd.Loops` in Triton.

    Args:
        deterministic: whether to sum the table's gradient in fixed point, so that a run can be repeated bit for bit.
    """

    def __init__(self, deterministic: bool = False):
        self.deterministic = deterministic

    def gather(self, points: Tensor, along: Tensor | None, table: Tensor, spec: GridSpec) -> Tensor:
        """See `autograd.Loops.gather`; in the table's dtype."""
        out = table.new_empty(len(points), spec.width)
        if len(points):
            programs, grid, constants = _launch(points, spec)
            direction = points if along is None else along
            triton_kernels.gather[programs](
                points, direction, table, *grid, out, len(points), spec.width, ALONG=along is not None, **constants
            )
        return out

    def scatter(self, points: Tensor, along: Tensor | None, grad: Tensor, spec: GridSpec) -> Tensor:
        """See `autograd.Loops.scatter`; in grad's dtype."""
        fixed = self.deterministic
        out = torch.zeros(
            spec.entries, spec.features, dtype=torch.int64 if fixed else points.dtype, device=points.device
        )
        if not len(points):
            return out.to(grad.dtype)
        programs, grid, constants = _launch(points, spec)
        factor, direction = grid[0], points if along is None else along
        if fixed:
            most = grad.abs().amax().double() * len(points)
            if along is not None:
                most = most * along.abs().sum(-1).amax() * max(spec.scales)
            factor = torch.exp2(SUM_BITS - torch.ceil(torch.log2(most.clamp_min(1e-300))))
        triton_kernels.scatter[programs](
            points, direction, grad, *grid, factor, out, len(points), spec.width, ALONG=along is not None, FIXED=fixed,
            **constants,
        )  # fmt: skip
        return (out / factor if fixed else out).to(grad.dtype)

    def point_gradient(self, points: Tensor, table: Tensor, grad: Tensor, spec: GridSpec) -> Tensor:
        """See `autograd.Loops.point_gradient`; the levels' parts are added in a fixed order."""
        parts = points.new_empty(spec.levels, len(points), 3)
        if len(points):
            programs, grid, constants = _launch(points, spec)
            triton_kernels.point_gradient[programs](
                points, grad, table, *grid, parts, len(points), spec.width, **constants
            )
        return parts.sum(0)

    def blend(
        self, sigma: Tensor, dt: Tensor, values: Tensor, offsets: Tensor, threshold: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `autograd.Loops.blend`."""
        rays, channels = len(offsets) - 1, values.shape[1]
        weights, transmittance = torch.zeros_like(sigma), torch.zeros_like(sigma)
        opacity, accumulated = sigma.new_empty(rays), values.new_empty(rays, channels)
        if rays:
            limit = _numbers((threshold,), sigma.dtype, sigma.device)
            triton_kernels.blend[(rays,)](
                sigma, dt, values, offsets, limit, weights, transmittance, opacity, accumulated, C=channels,
                CP=_power(channels), BLOCK=SAMPLES, enable_fp_fusion=True,
            )  # fmt: skip
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
        rays, channels = len(offsets) - 1, values.shape[1]
        g_sigma, g_values = torch.zeros_like(weights), torch.zeros_like(values)
        if rays:
            triton_kernels.blend_backward[(rays,)](
                dt, values, offsets, weights, transmittance, *grads, g_sigma, g_values, C=channels, CP=_power(channels),
                BLOCK=SAMPLES, enable_fp_fusion=True,
            )  # fmt: skip
        return g_sigma, g_values


ATOMIC, FIXED_POINT = Loops(), Loops(deterministic=True)


def _loops() -> Loops:
    """Return the loops that sum as torch's setting for deterministic algorithms asks."""
    return FIXED_POINT if torch.are_deterministic_algorithms_enabled() else ATOMIC


def hash_encode(points: Tensor, table: Tensor, spec: GridSpec) -> Tensor:
    """Compute `reference.hash_encode`."""
    return autograd.hash_encode(_loops(), points, table, spec)


def hash_slope(points: Tensor, table: Tensor, grad: Tensor, spec: GridSpec) -> Tensor:
    """Compute `reference.hash_slope`."""
    return autograd.hash_slope(_loops(), points, table, grad, spec)


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
    """Compute `reference.march`, sample for sample; with a ``capacity`` the host does not wait for the device."""
    check_march(origins, directions, occupancy, step)
    rays, cells = origins.shape[0], occupancy.shape[0]
    jitter = origins.new_full((rays,), 0.5) if jitter is None else jitter
    scalars = _numbers((step, near, far), origins.dtype, origins.device)
    inputs = (origins.contiguous(), directions.contiguous(), occupancy.contiguous().view(torch.uint8))
    inputs += (jitter.contiguous(), scalars)
    offsets = torch.zeros(rays + 1, dtype=torch.int64, device=origins.device)

    def run(write: bool, *samples: Tensor) -> None:
        if rays:
            triton_kernels.march[(triton.cdiv(rays, RAYS),)](
                *inputs, offsets, *samples, rays, cells, WRITE=write, BLOCK=RAYS, enable_fp_fusion=False
            )

    run(False, offsets, scalars, scalars)
    offsets = offsets.cumsum(0)
    count = int(offsets[-1]) if capacity is None else capacity
    if capacity is not None:
        offsets.clamp_(max=capacity)
    ray_index = torch.zeros(count, dtype=torch.int64, device=origins.device)
    points, t = origins.new_zeros(count, 3), origins.new_zeros(count)
    if count:
        run(True, ray_index, points, t)
    dt = torch.full_like(t, step)
    if capacity is not None:
        dt *= torch.arange(capacity, device=t.device) < offsets[-1]
    return Samples(ray_index, points, t, dt, offsets)


def composite(
    sigma: Tensor,  # (S,)
    dt: Tensor,  # (S,)
    values: Tensor,  # (S, C)
    offsets: Tensor,  # (R + 1,)
    threshold: float = TERMINATION,
) -> Composite:
    """Compute `reference.composite`."""
    return autograd.composite(ATOMIC, sigma, dt, values, offsets, threshold)
