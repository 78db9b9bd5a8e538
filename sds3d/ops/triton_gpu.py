"""The kernels of `reference` for a GPU, in Triton: nothing is built at install; Triton itself calls gcc or clang once.

Hash encoding: a program takes a block of points through one level, so that the level's entries stay in the cache; the
gradient in the table is summed with atomics in float32, or, where runs must not differ, in 64-bit fixed point, whose
sums do not depend on their order. Marching: a lane takes one ray, twice: it counts, then writes. Compositing: a
program takes one ray, a block of samples at a time, and stops where the light is spent.

Half-precision tables are read as such and computed with in float32. With TRITON_INTERPRET=1 in the environment before
this file is imported everything runs on a CPU, slowly: that is how the tests check it without a GPU.
"""

# Triton's types know kernels as plain functions: not what a launch takes beside their arguments, nor that its
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

POINTS = 256  # a program of the encoding
RAYS = 128  # a program of the march
SAMPLES = 64  # a block of the compositing
ROOM = 60  # bits for a fixed-point sum
# No compiler, a header that is missing, a library that does not load, no driver, an assembler that refuses:
FAILURES = (RuntimeError, subprocess.SubprocessError, OSError, ImportError, AssertionError, TritonError)


@lru_cache(maxsize=8)
def refusal(device: torch.device) -> str:
    """Why no kernel can be launched on a device, "" where one can: found out once, by launching the smallest."""
    try:
        triton_kernels.touch[(1,)](torch.empty(1, device=device))
    except FAILURES as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


@lru_cache(maxsize=64)
def _grid(spec: GridSpec, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The grid as the kernels read it: scales (L,), `reference.level_rows` (L, 5)."""
    return torch.tensor(spec.scales, dtype=dtype, device=device), torch.tensor(level_rows(spec), device=device)


@lru_cache(maxsize=64)
def _numbers(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that kernels read in the data's own dtype (an argument would be float32); copied over once."""
    return torch.tensor(values, dtype=dtype, device=device)


def _power(count: int) -> int:
    """The next power of two, which is how wide a block has to be."""
    return triton.next_power_of_2(max(count, 1))


def _launch(points: Tensor, spec: GridSpec) -> tuple[tuple[int, int], tuple[Tensor, Tensor], dict[str, int]]:
    """Programs, the grid's numbers and the constants of an encoding kernel."""
    constants = {"F": spec.features, "FP": _power(spec.features), "BLOCK": POINTS, "enable_fp_fusion": True}
    return (triton.cdiv(len(points), POINTS), spec.levels), _grid(spec, points.dtype, points.device), constants


class Loops:
    """`autograd.Loops` in Triton.

    Args:
        deterministic: sum the table's gradient in fixed point, so that a run can be repeated bit for bit.
    """

    def __init__(self, deterministic: bool = False):
        self.deterministic = deterministic

    def gather(self, points: Tensor, along: Tensor | None, table: Tensor, spec: GridSpec) -> Tensor:
        """Features (N, L * F) in the table's dtype."""
        out = table.new_empty(len(points), spec.width)
        if len(points):
            programs, grid, constants = _launch(points, spec)
            moving = points if along is None else along
            triton_kernels.gather[programs](
                points, moving, table, *grid, out, len(points), spec.width, ALONG=along is not None, **constants
            )
        return out

    def scatter(self, points: Tensor, along: Tensor | None, grad: Tensor, spec: GridSpec) -> Tensor:
        """The table's gradient (entries, F) in grad's dtype."""
        fixed = self.deterministic
        out = torch.zeros(
            spec.entries, spec.features, dtype=torch.int64 if fixed else points.dtype, device=points.device
        )
        if not len(points):
            return out.to(grad.dtype)
        programs, grid, constants = _launch(points, spec)
        factor, moving = grid[0], points if along is None else along
        if fixed:
            most = grad.abs().amax().double() * len(points)
            if along is not None:
                most = most * along.abs().sum(-1).amax() * max(spec.scales)
            factor = torch.exp2(ROOM - torch.ceil(torch.log2(most.clamp_min(1e-300))))
        triton_kernels.scatter[programs](
            points, moving, grad, *grid, factor, out, len(points), spec.width, ALONG=along is not None, FIXED=fixed,
            **constants,
        )  # fmt: skip
        return (out / factor if fixed else out).to(grad.dtype)

    def point_gradient(self, points: Tensor, table: Tensor, grad: Tensor, spec: GridSpec) -> Tensor:
        """(N, 3): the levels' parts, added up in order."""
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
        weights, light = torch.zeros_like(sigma), torch.zeros_like(sigma)
        opacity, accumulated = sigma.new_empty(rays), values.new_empty(rays, channels)
        if rays:
            limit = _numbers((threshold,), sigma.dtype, sigma.device)
            triton_kernels.blend[(rays,)](
                sigma, dt, values, offsets, limit, weights, light, opacity, accumulated, C=channels,
                CP=_power(channels), BLOCK=SAMPLES, enable_fp_fusion=True,
            )  # fmt: skip
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
        rays, channels = len(offsets) - 1, values.shape[1]
        g_sigma, g_values = torch.zeros_like(weights), torch.zeros_like(values)
        if rays:
            triton_kernels.blend_backward[(rays,)](
                dt, values, offsets, weights, light, *grads, g_sigma, g_values, C=channels, CP=_power(channels),
                BLOCK=SAMPLES, enable_fp_fusion=True,
            )  # fmt: skip
        return g_sigma, g_values


ATOMIC, FIXED_POINT = Loops(), Loops(deterministic=True)


def hash_encode(points: Tensor, table: Tensor, spec: GridSpec) -> Tensor:
    """As `reference.hash_encode`."""
    loops = FIXED_POINT if torch.are_deterministic_algorithms_enabled() else ATOMIC
    return autograd.hash_encode(loops, points, table, spec)


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
    """As `reference.march`, sample for sample; with ``room`` the device is never waited for."""
    check_march(origins, directions, occupancy, step)
    rays, cells = origins.shape[0], occupancy.shape[0]
    jitter = origins.new_full((rays,), 0.5) if jitter is None else jitter
    setting = _numbers((step, near, far), origins.dtype, origins.device)
    inputs = (origins.contiguous(), directions.contiguous(), occupancy.contiguous().view(torch.uint8))
    inputs += (jitter.contiguous(), setting)
    offsets = torch.zeros(rays + 1, dtype=torch.int64, device=origins.device)

    def run(write: bool, *samples: Tensor) -> None:
        if rays:
            triton_kernels.march[(triton.cdiv(rays, RAYS),)](
                *inputs, offsets, *samples, rays, cells, WRITE=write, BLOCK=RAYS, enable_fp_fusion=False
            )

    run(False, offsets, setting, setting)
    offsets = offsets.cumsum(0)
    count = int(offsets[-1]) if room is None else room
    if room is not None:
        offsets.clamp_(max=room)
    ray_index = torch.zeros(count, dtype=torch.int64, device=origins.device)
    points, t = origins.new_zeros(count, 3), origins.new_zeros(count)
    if count:
        run(True, ray_index, points, t)
    dt = torch.full_like(t, step)
    if room is not None:
        dt *= torch.arange(room, device=t.device) < offsets[-1]
    return Samples(ray_index, points, t, dt, offsets)


def composite(
    sigma: Tensor,  # (S,)
    dt: Tensor,  # (S,)
    values: Tensor,  # (S, C)
    offsets: Tensor,  # (R + 1,)
    threshold: float = TERMINATION,
) -> Composite:
    """As `reference.composite`."""
    return autograd.composite(ATOMIC, sigma, dt, values, offsets, threshold)
