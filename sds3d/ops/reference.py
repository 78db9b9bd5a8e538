"""The definition of the hot kernels in plain torch: hash encoding, ray marching, compositing.

Every backend computes the same functions. The hash grid follows Mueller et al., arXiv 2201.05989 (section 3 and eq. 4),
with tiny-cuda-nn's conventions. Level l has scale = base * b^l - 1 and resolution = ceil(scale) + 1. A point x in
[0, 1]^3 has the grid coordinates x * scale + 0.5. A level is indexed densely (x fastest) if resolution^3 entries fit
into the table, and otherwise by

    h(x, y, z) = (x * 1  xor  y * 2654435761  xor  z * 805459861)  in uint32,  modulo the level's size.

A corner beyond a dense level's far face wraps modulo the level's size, as in tiny-cuda-nn.

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
TERMINATION = 1e-4  # transmittance below which a ray ends


@dataclass(frozen=True)
class GridSpec:
    """Shape of a multi-resolution hash grid.

    Args:
        levels: number of resolutions, >= 1.
        features: numbers stored per entry, >= 1.
        log2_table: a level has at most 2^log2_table entries; 3 to 24.
        base: the coarsest level has the scale base - 1; 1 to 4096.
        finest: the finest level has the scale finest - 1; base to 65536.

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
        """b: the ratio of a level's resolution to that of the level before."""
        return (self.finest / self.base) ** (1 / (self.levels - 1)) if self.levels > 1 else 1.0

    @cached_property
    def scales(self) -> tuple[float, ...]:
        """base * b^l - 1 for each level, rounded to float32, so that whole numbers stay whole."""
        exact = [self.base * self.per_level_scale**level - 1 for level in range(self.levels)]
        return tuple(torch.tensor(exact, dtype=torch.float64).float().tolist())

    @cached_property
    def resolutions(self) -> tuple[int, ...]:
        """Grid points along an axis, for each level."""
        return tuple(math.ceil(scale) + 1 for scale in self.scales)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each level: resolution^3 rounded up to a multiple of 8, at most 2^log2_table."""
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
        """Rows of the table: the entries of all levels."""
        return self.offsets[-1]

    @property
    def width(self) -> int:
        """Features of one point: levels * features."""
        return self.levels * self.features


class Samples(NamedTuple):
    """Packed samples along rays: ray r has the rows offsets[r] to offsets[r + 1], near to far. Rows after offsets[-1]
    are padding and belong to no ray."""

    ray_index: Tensor  # (S,) int64
    points: Tensor  # (S, 3) world
    t: Tensor  # (S,) distance along the ray
    dt: Tensor  # (S,) length of the ray segment that a sample represents
    offsets: Tensor  # (R + 1,) int64


def resized(samples: Samples, capacity: int | None) -> Samples:
    """Return the samples in tensors of ``capacity`` rows; None returns them as they are.

    Samples beyond the capacity, those of the last rays, are cut off. Missing rows are padded with 0 after offsets[-1].
    """
    if capacity is None:
        return samples
    ray_index, points, t, dt, offsets = samples
    padding = max(capacity - t.shape[0], 0)

    def rows(x: Tensor) -> Tensor:
        return torch.cat([x[:capacity], x.new_zeros(padding, *x.shape[1:])])

    return Samples(rows(ray_index), rows(points), rows(t), rows(dt), offsets.clamp(max=capacity))


class Composite(NamedTuple):
    """The result of compositing. A ray that hits nothing has opacity 0."""

    weights: Tensor  # (S,)
    opacity: Tensor  # (R,) sum of the weights
    accumulated: Tensor  # (R, C) weighted sum of the values, without a background


def check_hash_encode(points: Tensor, table: Tensor, spec: GridSpec) -> None:
    """Raise AssertionError unless points are (N, 3) and the table is (entries, features), in their dtype or a half."""
    assert points.ndim == 2 and points.shape[1] == 3, points.shape
    assert table.shape == (spec.entries, spec.features), (table.shape, spec)
    assert table.dtype in (points.dtype, torch.float16, torch.bfloat16), (points.dtype, table.dtype)


def check_march(origins: Tensor, directions: Tensor, occupancy: Tensor, step: float) -> None:
    """Raise AssertionError for wrong shapes, ValueError for a step that is not positive."""
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
    """Return, for each level: stride of y, stride of z (the primes if it is hashed), size, first entry, 1 if dense."""
    return [
        (r, r * r, size, first, 1) if dense else (PRIMES[1], PRIMES[2], size, first, 0)
        for r, size, first, dense in zip(spec.resolutions, spec.sizes, spec.offsets, spec.dense)
    ]


def corner_index(corner: Tensor, level: int, spec: GridSpec) -> Tensor:
    """Return the entries (N,) int64, within their level, of integer grid points (N, 3) int64."""
    size, resolution = spec.sizes[level], spec.resolutions[level]
    if spec.dense[level]:
        index = corner[:, 0] + resolution * (corner[:, 1] + resolution * corner[:, 2])
    else:  # int64 products wrap and agree with uint32 ones in the low 32 bits
        x, y, z = ((corner[:, axis] * prime) & 0xFFFFFFFF for axis, prime in enumerate(PRIMES))
        index = x ^ y ^ z
    return index % size


def hash_encode(points: Tensor, table: Tensor, spec: GridSpec) -> Tensor:
    """Return the trilinear features of every level, side by side.

    Args:
        points: (N, 3) in [0, 1]. Points outside are clamped to the box and get no gradient. NaN reads as 0.
        table: (spec.entries, features) in the points' dtype or a half precision, which is converted to it first.

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


def hash_slope(points: Tensor, table: Tensor, grad: Tensor, spec: GridSpec) -> Tensor:
    """Return the gradient of sum(grad * features) in the points, where `features` are those of `hash_encode`.

    Args:
        points, table: as for `hash_encode`.
        grad: (N, levels * features), constant in the points.

    Returns:
        (N, 3) in the points' dtype; 0 outside the box. Differentiable in the table and in grad, not in the points.
    """
    check_hash_encode(points, table, spec)
    points = points.detach()
    inside, wide = torch.where(points.isnan(), 0, points.clamp(0, 1)), table.to(points.dtype)
    total = torch.zeros_like(points)
    for level, (scale, part) in enumerate(zip(spec.scales, grad.to(points.dtype).split(spec.features, -1))):
        position = inside * scale + 0.5
        cell = position.floor()
        fraction = position - cell
        for bits in range(8):
            offset = torch.tensor([bits >> axis & 1 for axis in range(3)], device=points.device)  # (3,)
            weight = torch.where(offset.bool(), fraction, 1 - fraction)
            others = weight[:, [1, 2, 0]] * weight[:, [2, 0, 1]]  # the weight is a product of the three axes
            index = spec.offsets[level] + corner_index(cell.long() + offset, level, spec)
            along = (wide.index_select(0, index) * part).sum(-1, keepdim=True)
            total = total + along * others * (2 * offset - 1) * scale
    return torch.where((points >= 0) & (points <= 1), total, 0)


def box_interval(origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distances (R,), (R,) at which rays (R, 3) enter and leave [-1, 1]^3; enter >= leave for a miss."""
    parallel = directions == 0
    outside = (parallel & ~(origins.abs() <= 1)).any(-1)  # negated, so that NaN counts as outside
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
    capacity: int | None = None,
) -> Samples:
    """Sample rays evenly through the box [-1, 1]^3 and keep the samples in occupied cells.

    Args:
        directions: unit vectors. Samples are at the distances start + (i + jitter) * step for i = 0, 1, ... up to
            the box's far side or ``far``; start is the larger of ``near`` and the distance of the box's near side.
        occupancy: indexed [x, y, z], cell 0 at -1.
        step: scene units, > 0; each sample's dt.
        jitter: in [0, 1), one a ray. None is 0.5, the middle of each interval. With a uniform jitter
            the sum over samples is an unbiased estimate of the integral along the ray.
        capacity: number of rows to allocate (see ``resized``). With it the host need not wait for a GPU to count the
            samples. None allocates as many rows as there are samples.

    Returns:
        Samples without gradient. A ray that holds a NaN or has the direction 0 gets no samples.

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
    distance = (torch.arange(steps, device=device, dtype=origins.dtype) + jitter[:, None]) * step  # (R, N) from start
    t = torch.where(hit, start, 0)[:, None] + distance
    points = origins[:, None] + t[..., None] * directions[:, None]  # (R, N, 3)
    cells = occupancy.shape[0]
    cell = torch.where(points.isnan(), 0, (points + 1) * (cells / 2)).clamp(0, cells - 1).long()
    keep = (distance < reach[:, None]) & occupancy[cell[..., 0], cell[..., 1], cell[..., 2]]
    offsets = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.sum(-1).cumsum(0)])
    ray_index = keep.nonzero()[:, 0]
    samples = Samples(ray_index, points[keep], t[keep], t.new_full((ray_index.shape[0],), step), offsets)
    return resized(samples, capacity)


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
        values: colours, distances, normals or anything else to be blended. C may be 0.
        offsets: int64, as `march` returns them. Samples after offsets[-1] have weight 0 and get no gradient.
        threshold: samples with a transmittance below this have weight 0 and get no gradient.

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
    transmittance = torch.exp(-before)
    transmittance = torch.where(transmittance >= threshold, transmittance, 0)
    weights = (transmittance * -torch.expm1(-depth))[ray_index, column]  # (S,)
    opacity = weights.new_zeros(rays).index_add(0, ray_index, weights)
    accumulated = values.new_zeros(rays, values.shape[1]).index_add(0, ray_index, weights[:, None] * values)
    return Composite(torch.cat([weights, weights.new_zeros(size - used)]), opacity, accumulated)
