"""The definition of the hot kernels in plain torch: hash encoding, ray marching, compositing.

Every backend computes these same functions. The hash grid is that of Mueller et al., arXiv 2201.05989
(section 3 and eq. 4), with tiny-cuda-nn's conventions: level l has scale = base * b^l - 1 and
resolution = ceil(scale) + 1; a point x in [0, 1]^3 sits at x * scale + 0.5 in it; a level is indexed
densely (x fastest) while resolution^3 fits the table and otherwise by

    h(x, y, z) = (x * 1  xor  y * 2654435761  xor  z * 805459861)  in uint32,  modulo the level's size.

The corner past a dense level's far face wraps modulo the level's size, as it does there.

Compositing is the emission-absorption quadrature of Max 1995 and NeRF (arXiv 2003.08934, eq. 3):

    alpha_i = 1 - exp(-sigma_i dt_i),   T_i = exp(-sum_{j<i} sigma_j dt_j),   w_i = T_i alpha_i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

PRIMES = (1, 2654435761, 805459861)
TERMINATION = 1e-4  # light below which a ray is finished


@dataclass(frozen=True)
class GridSpec:
    """Shape of a multi-resolution hash grid.

    Args:
        levels: number of resolutions, >= 1.
        features: numbers stored per entry, >= 1.
        log2_table: at most 2^log2_table entries a level, 3 to 24.
        base: the coarsest level's b^0 * base, >= 1.
        finest: the finest level's base * b^(levels - 1), >= base.

    Raises:
        ValueError: a field is out of its range.
    """

    levels: int = 12
    features: int = 2
    log2_table: int = 15
    base: int = 16
    finest: int = 128

    def __post_init__(self):
        for name, low, high in (("levels", 1, 64), ("features", 1, 64), ("log2_table", 3, 24), ("base", 1, 4096)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"hash grid: {name} is {value}; give a number from {low} to {high}")
        if not self.base <= self.finest <= 65536:
            raise ValueError(f"hash grid: finest is {self.finest}; give a number from base ({self.base}) to 65536")

    @cached_property
    def per_level_scale(self) -> float:
        """b: how much finer each level is than the one before."""
        return (self.finest / self.base) ** (1 / (self.levels - 1)) if self.levels > 1 else 1.0

    @cached_property
    def scales(self) -> tuple[float, ...]:
        """base * b^l - 1 for each level, rounded to float32 so that a whole number comes out whole."""
        exact = [self.base * self.per_level_scale**level - 1 for level in range(self.levels)]
        return tuple(torch.tensor(exact, dtype=torch.float64).float().tolist())

    @cached_property
    def resolutions(self) -> tuple[int, ...]:
        """Grid points along an axis, for each level."""
        return tuple(math.ceil(scale) + 1 for scale in self.scales)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each level: resolution^3 rounded up to 8, at most 2^log2_table."""
        return tuple(min(-(-(r**3) // 8) * 8, 2**self.log2_table) for r in self.resolutions)

    @cached_property
    def dense(self) -> tuple[bool, ...]:
        """Whether a level has an entry for every grid point."""
        return tuple(r**3 <= size for r, size in zip(self.resolutions, self.sizes))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First entry of each level in the table, and the total at the end: levels + 1 numbers."""
        return tuple(sum(self.sizes[:level]) for level in range(self.levels + 1))

    @property
    def entries(self) -> int:
        """Rows of the table, all levels together."""
        return self.offsets[-1]

    @property
    def width(self) -> int:
        """Numbers that encode one point: levels * features."""
        return self.levels * self.features


class Samples(NamedTuple):
    """Samples along rays, packed: those of ray r are offsets[r] to offsets[r + 1], near to far. Rows after offsets[-1]
    belong to no ray."""

    ray_index: Tensor  # (S,) int64
    points: Tensor  # (S, 3) world
    t: Tensor  # (S,) distance along the ray
    dt: Tensor  # (S,) length each sample stands for
    offsets: Tensor  # (R + 1,) int64


def fitted(samples: Samples, room: int | None) -> Samples:
    """The samples in tensors of ``room`` rows: cut off, ray by ray from the last, or filled up with rows of 0 that
    belong to no ray (they stand after offsets[-1]). With None, as they are."""
    if room is None:
        return samples
    ray_index, points, t, dt, offsets = samples
    more = max(room - t.shape[0], 0)

    def rows(x: Tensor) -> Tensor:
        return torch.cat([x[:room], x.new_zeros(more, *x.shape[1:])])

    return Samples(rows(ray_index), rows(points), rows(t), rows(dt), offsets.clamp(max=room))


class Composite(NamedTuple):
    """What compositing gives. Opacity 0 is an empty ray."""

    weights: Tensor  # (S,)
    opacity: Tensor  # (R,) sum of the weights
    accumulated: Tensor  # (R, C) weighted sum of the values, on black


def check_hash_encode(points: Tensor, table: Tensor, spec: GridSpec) -> None:
    """Raise AssertionError unless points are (N, 3), table is (entries, features), and of their dtype or a half."""
    assert points.ndim == 2 and points.shape[1] == 3, points.shape
    assert table.shape == (spec.entries, spec.features), (table.shape, spec)
    assert table.dtype in (points.dtype, torch.float16, torch.bfloat16), (points.dtype, table.dtype)


def check_march(origins: Tensor, directions: Tensor, occupancy: Tensor, step: float) -> None:
    """Raise AssertionError on shapes, ValueError on a step that is not positive."""
    assert origins.ndim == 2 and origins.shape[1] == 3 and origins.shape == directions.shape, origins.shape
    assert occupancy.dtype == torch.bool and occupancy.ndim == 3, (occupancy.dtype, occupancy.shape)
    assert len(set(occupancy.shape)) == 1, occupancy.shape
    if not (step > 0 and math.isfinite(step)):
        raise ValueError(f"march: step is {step}; give a positive length in scene units")


def check_composite(sigma: Tensor, dt: Tensor, values: Tensor, offsets: Tensor) -> None:
    """Raise AssertionError unless sigma and dt are (S,), values (S, C) and offsets (R + 1,)."""
    assert sigma.ndim == 1 and sigma.shape == dt.shape, (sigma.shape, dt.shape)
    assert values.ndim == 2 and values.shape[0] == sigma.shape[0], (values.shape, sigma.shape)
    assert offsets.ndim == 1 and offsets.shape[0] >= 1 and offsets.dtype == torch.int64, (offsets.shape, offsets.dtype)


def level_rows(spec: GridSpec) -> list[tuple[int, int, int, int, int]]:
    """Of each level, for loops: strides of y and z (the primes, where it is hashed), size, first entry, 1 if dense."""
    return [
        (r, r * r, size, first, 1) if dense else (PRIMES[1], PRIMES[2], size, first, 0)
        for r, size, first, dense in zip(spec.resolutions, spec.sizes, spec.offsets, spec.dense)
    ]


def corner_index(corner: Tensor, level: int, spec: GridSpec) -> Tensor:
    """Entry, within its level, of integer grid points (N, 3) int64 -> (N,) int64."""
    size, resolution = spec.sizes[level], spec.resolutions[level]
    if spec.dense[level]:
        index = corner[:, 0] + resolution * (corner[:, 1] + resolution * corner[:, 2])
    else:  # uint32 products wrap; int64 wraps too and agrees in its low 32 bits
        x, y, z = ((corner[:, axis] * prime) & 0xFFFFFFFF for axis, prime in enumerate(PRIMES))
        index = x ^ y ^ z
    return index % size


def hash_encode(points: Tensor, table: Tensor, spec: GridSpec) -> Tensor:
    """Trilinear features of every level, side by side.

    Args:
        points: (N, 3) in [0, 1]. What lies outside is clamped to the box (no gradient flows to it);
            NaN reads as 0.
        table: (spec.entries, features), the points' dtype, or a half, which is computed with in the points' dtype.

    Returns:
        (N, levels * features) in the table's dtype, level by level. Differentiable in the table, and in the points.
    """
    check_hash_encode(points, table, spec)
    inside, wide = torch.where(points.isnan(), 0, points.clamp(0, 1)), table.to(points.dtype)
    features = []
    for level, scale in enumerate(spec.scales):
        position = inside * scale + 0.5  # (N, 3)
        cell = position.detach().floor()
        fraction = position - cell
        total = points.new_zeros(points.shape[0], spec.features)
        for bits in range(8):
            offset = torch.tensor([bits >> axis & 1 for axis in range(3)], device=points.device)  # (3,)
            weight = torch.where(offset.bool(), fraction, 1 - fraction).prod(-1)  # (N,)
            index = spec.offsets[level] + corner_index(cell.long() + offset, level, spec)
            total = total + weight[:, None] * wide.index_select(0, index)
        features.append(total)
    return torch.cat(features, -1).to(table.dtype)


def box_interval(origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays (R, 3) enter and leave [-1, 1]^3: two (R,); enter >= leave where they miss."""
    parallel = directions == 0
    outside = (parallel & ~(origins.abs() <= 1)).any(-1)  # so written that NaN is outside
    a, b = (-1 - origins) / directions, (1 - origins) / directions  # (R, 3)
    enter = torch.where(parallel, -math.inf, torch.minimum(a, b)).amax(-1)
    leave = torch.where(parallel, math.inf, torch.maximum(a, b)).amin(-1)
    return enter, torch.where(outside, -math.inf, leave)


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
    """Evenly spaced samples through the box, kept where the occupancy grid is true.

    Args:
        directions: unit vectors; samples stand at start + (i + jitter) * step for i = 0, 1, ... up to
            the box's far side or ``far``, where start is the larger of ``near`` and the box's near side.
        occupancy: indexed [x, y, z], cell 0 at -1.
        step: scene units, > 0; each sample's dt.
        jitter: in [0, 1), one a ray; None is 0.5, the middle of each interval. With a uniform jitter
            the sum over samples is an unbiased estimate of the integral along the ray.
        room: rows to make, whatever the number of samples (see ``fitted``), so that a GPU need not be asked for it;
            None makes as many as there are.

    Returns:
        Samples without gradient. A ray with a NaN or of zero direction has none.

    Raises:
        ValueError: step is not positive.
    """
    check_march(origins, directions, occupancy, step)
    rays, device = origins.shape[0], origins.device
    jitter = origins.new_full((rays,), 0.5) if jitter is None else jitter
    enter, leave = box_interval(origins, directions)
    start, stop = enter.clamp(min=near), leave.clamp(max=far)
    hit = (stop > start) & torch.isfinite(start) & torch.isfinite(stop)
    reach = torch.where(hit, stop - start, 0)
    steps = int(torch.ceil(reach.max() / step)) + 1 if rays else 0
    place = (torch.arange(steps, device=device, dtype=origins.dtype) + jitter[:, None]) * step  # (R, N)
    t = torch.where(hit, start, 0)[:, None] + place
    points = origins[:, None] + t[..., None] * directions[:, None]  # (R, N, 3)
    cells = occupancy.shape[0]
    cell = torch.where(points.isnan(), 0, (points + 1) * (cells / 2)).clamp(0, cells - 1).long()
    keep = (place < reach[:, None]) & occupancy[cell[..., 0], cell[..., 1], cell[..., 2]]
    offsets = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.sum(-1).cumsum(0)])
    ray_index = keep.nonzero()[:, 0]
    samples = Samples(ray_index, points[keep], t[keep], t.new_full((ray_index.shape[0],), step), offsets)
    return fitted(samples, room)


def composite(
    sigma: Tensor,  # (S,)
    dt: Tensor,  # (S,)
    values: Tensor,  # (S, C)
    offsets: Tensor,  # (R + 1,)
    threshold: float = TERMINATION,
) -> Composite:
    """Blend the samples of each ray, near to far.

    Args:
        sigma: densities >= 0, per scene unit.
        dt: lengths, scene units.
        values: whatever is to be blended: colours, distances, normals. C may be 0.
        offsets: int64, as `march` gives them. Samples after offsets[-1] weigh nothing and get no gradient.
        threshold: a sample that less light than this reaches weighs nothing and gets no gradient.

    Returns:
        Composite, differentiable in sigma and values.
    """
    check_composite(sigma, dt, values, offsets)
    rays, size = offsets.shape[0] - 1, sigma.shape[0]
    counts = offsets.diff()
    ray_index = torch.repeat_interleave(torch.arange(rays, device=sigma.device), counts)  # (S,)
    used = ray_index.shape[0]
    sigma, dt, values = sigma[:used], dt[:used], values[:used]
    column = torch.arange(used, device=sigma.device) - offsets[ray_index]
    width = int(counts.max()) if rays else 0
    depth = (sigma * dt).new_zeros(rays, width).index_put((ray_index, column), sigma * dt)  # (R, N)
    before = torch.cat([depth.new_zeros(rays, 1), depth.cumsum(-1)[:, :-1]], -1)[:, :width]
    light = torch.exp(-before)
    light = torch.where(light >= threshold, light, 0)
    weights = (light * -torch.expm1(-depth))[ray_index, column]  # (S,)
    opacity = weights.new_zeros(rays).index_add(0, ray_index, weights)
    accumulated = values.new_zeros(rays, values.shape[1]).index_add(0, ray_index, weights[:, None] * values)
    return Composite(torch.cat([weights, weights.new_zeros(size - used)]), opacity, accumulated)
