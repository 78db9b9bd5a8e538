"""Volume rendering of a field: rays, samples in occupied cells, colour, opacity, depth and normals.

Emission and absorption (NeRF, arXiv 2003.08934, eq. 3), with a plain background b behind the box:

    w_i = T_i (1 - exp(-sigma_i dt_i)),  opacity = sum_i w_i,  rgb = sum_i w_i c_i + (1 - opacity) b
    depth = sum_i w_i (t_i - lead_i) / opacity

where t_i - lead_i is the mean end of the light that ends in the segment t_i +- dt_i / 2 of constant density:

    lead = (coth(x / 2) / 2 - 1 / x) dt,  x = sigma dt;  0 in thin fog, dt / 2 in a solid

Without it a solid would seem to lie half a step behind its surface.

Of an SDF, sample i stands for the step before it, over which its depth s below the surface goes from s_(i-1) to s_i
(NeuS, arXiv 2106.10689, eq. 13):

    sigma dt = max(0, S(s_i / b) - S(s_(i-1) / b)),  S = softplus

So light that goes straight in meets the density of the field, sigmoid(s / b) / b, and light that only grazes a side has
lost half of itself if it touches s = 0. With the field's density everywhere it would have lost it long before, in the
faint skin of the side, and a silhouette would lie several widths outside of the surface that frontal views show. The
mean end of light that ends in the step is that of the transmittance 1 / (1 + exp(s / b)) for a linear s: where a step
crosses the surface, it is at s = 0, however long the step is.

Shading is as `sds3d.students.representation.Shading` has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sds3d.cameras import Cameras, Poses
from sds3d.ops import Samples
from sds3d.runtime.transfer import onto
from sds3d.students.representation import ALBEDO, Shading, Views
from sds3d.students.scene.field import Field
from sds3d.students.scene.occupancy import Occupancy

Background = Tensor | Callable[[Tensor], Tensor]  # (3,), (B, 3), or directions (R, 3) -> colours (R, 3)

# The density of an SDF counts as constant over a step that begins deeper than DEEP below the surface, or over which the
# depth changes by less than LITTLE; both in widths.
DEEP = 4.0
LITTLE = 0.2


@dataclass(frozen=True)
class RenderOptions:
    """Options of one render.

    Args:
        step: length of one sample step, scene units.
        shading: the shading of the colours.
        normals: whether to render normals even if the shading does not need them.
        dark: samples with a transmittance below this have weight 0.
        chunk: rays rendered at a time. With gradients and more rays than that, each chunk is rendered again in the
            backward pass, so that the memory is that of one chunk; this is a quarter slower.
        capacity: rows to allocate for the samples (see ops.reference.march); None counts the samples first.
            Ignored if there are several chunks.
        faint: samples whose weight per scene unit of their ray is at most this get no normal, but 0: most samples of a
            surface do. So a pixel loses at most this times the length of its ray in occupied cells.
    """

    step: float = 2 / 32
    shading: Shading = ALBEDO
    normals: bool = False
    dark: float = 1e-3
    chunk: int = 16384
    capacity: int | None = None
    faint: float = 0.15


@dataclass
class RenderOut(Views):
    """Images of B views, and the samples of which they were made.

    Args:
        trace: the samples, for the regularisers; None in a render without gradients.
    """

    trace: Trace | None


@dataclass
class Trace:
    """The samples of a render, packed by ray.

    Args:
        samples: positions, distances and lengths, without gradient.
        sigma: (S,) densities.
        weights: (S,) compositing weights.
        opacity: (R,) of all rays.
        normals: (S, 3) outward unit normals, or None.
        directions: (R, 3) of all rays, unit.
    """

    samples: Samples
    sigma: Tensor
    weights: Tensor
    opacity: Tensor
    normals: Tensor | None
    directions: Tensor


def render(
    field: Field,
    occupancy: Occupancy,
    cameras: Cameras | Poses,
    resolution: int,
    background: Background,
    options: RenderOptions,
    rng: torch.Generator | None = None,
) -> RenderOut:
    """Render images of the field.

    Args:
        cameras: B views, on the field's device.
        resolution: height in pixels. Images of Cameras are square; Poses have an aspect ratio.
        background: (3,), one colour a view (B, 3), or a function of the directions (R, 3).
        rng: CPU generator of a training render, which jitters each ray's samples and visits only part of the occupancy
            grid's rim. None puts samples in the middle of their steps and visits every occupied cell.

    Returns:
        RenderOut, with gradients and a trace if gradients are enabled.

    Raises:
        ValueError: the resolution is below 1.
    """
    if resolution < 1:
        raise ValueError(f"render.resolution is {resolution}; give at least 1 pixel (64 is usual)")
    origins, directions = cameras.rays(resolution)
    views, height, width = origins.shape[:3]
    origins, directions = origins.reshape(-1, 3), directions.reshape(-1, 3)
    rays, pixels = origins.shape[0], height * width
    jitter, cells = None, occupancy.cells
    if rng is not None:
        cells = occupancy.thinned(rng)
        jitter = onto(torch.rand(rays, generator=rng, dtype=origins.dtype), origins.device)
    behind = background(directions) if callable(background) else onto(background, origins.device).to(origins.dtype)
    if behind.ndim == 2 and behind.shape[0] == views and not callable(background):
        behind = behind.repeat_interleave(pixels, 0)
    light = _light(options.shading, cameras)
    whole, parts = rays <= options.chunk, []
    for start in range(0, rays, options.chunk):
        part = slice(start, start + options.chunk)
        shift, capacity = None if jitter is None else jitter[part], options.capacity if whole else None
        samples = field.backend.march(origins[part], directions[part], cells, options.step, shift, capacity=capacity)
        lit = None if light is None else light[(samples.ray_index + start) // pixels]
        if whole or not torch.is_grad_enabled():
            parts.append(_shade(field, samples, directions[part], lit, options))
        else:
            shade = partial(_shade, field, samples, directions[part], lit, options)
            parts.append(checkpoint(shade, use_reentrant=False, preserve_rng_state=False))
    image, trace = parts[0] if whole else (torch.cat([p[0] for p in parts]), _concatenated([p[1] for p in parts]))
    opacity = image[:, 4:5]
    rgb = torch.addcmul(image[:, :3], 1 - opacity, behind.expand(rays, 3))
    depth = image[:, 3:4] / opacity.clamp_min(1e-6)

    def fold(x: Tensor) -> Tensor:  # (R, C) -> (B, C, H, W)
        return x.view(views, height, width, -1).permute(0, 3, 1, 2)

    normal = fold(image[:, 5:]) if image.shape[1] > 5 else None
    return RenderOut(fold(rgb), fold(opacity), fold(depth), normal, trace)


def _concatenated(traces: list[Trace | None]) -> Trace | None:
    """Return the traces of consecutive chunks of rays as one."""
    known = [trace for trace in traces if trace is not None]  # all of them, or none in a render without gradients
    if not known:
        return None
    samples, first_ray, first_sample = [], 0, 0
    for trace in known:
        s = trace.samples
        samples.append(s._replace(ray_index=s.ray_index + first_ray, offsets=s.offsets[1:] + first_sample))
        first_ray, first_sample = first_ray + len(trace.opacity), first_sample + len(s.t)
    start = known[0].samples.offsets[:1]
    parts = [torch.cat(columns) for columns in zip(*samples, strict=True)]
    parts[-1] = torch.cat([start, parts[-1]])

    def cat(name: str) -> Tensor:
        return torch.cat([getattr(trace, name) for trace in known])

    normals = None if known[0].normals is None else cat("normals")
    return Trace(Samples(*parts), cat("sigma"), cat("weights"), cat("opacity"), normals, cat("directions"))


def _light(shading: Shading, cameras: Cameras | Poses) -> Tensor | None:
    """Return unit directions towards the light, (B, 3), or None for "albedo"."""
    if shading.kind == "albedo":
        return None
    light = cameras.positions()
    if shading.light is not None:
        light = onto(shading.light, light.device).to(light.dtype)
    return F.normalize(light.expand(len(cameras), 3), dim=-1)


def _shade(
    field: Field, samples: Samples, directions: Tensor, light: Tensor | None, options: RenderOptions
) -> tuple[Tensor, Trace | None]:
    """Shade packed samples with light directions (S, 3) and composite them.

    Returns:
        (R, 5) colour, depth * opacity, opacity, or (R, 8) with normals; and the trace, if gradients are enabled.
    """
    shading = options.shading
    if field.width is None:
        sigma, values = field(samples.points)
        ends = samples.t - lead(sigma, samples.dt)
    else:
        inside, values = field.raw(samples.points)
        sigma, ends = crossings(inside, samples, field.width)
    normals = _normals(field, samples, sigma, options) if light is not None or options.normals else None
    if light is not None:
        assert normals is not None
        facing = (normals * light).sum(-1, keepdim=True).clamp_min(0)
        shade = shading.ambient + (1 - shading.ambient) * facing
        values = values * shade if shading.kind == "lambertian" else shade.expand(-1, 3)
    values = torch.cat([values, ends[:, None]] + ([] if normals is None else [normals]), -1)
    out = field.backend.composite(sigma, samples.dt, values, samples.offsets, options.dark)
    image = torch.cat([out.accumulated[:, :4], out.opacity[:, None], out.accumulated[:, 4:]], -1)
    if not torch.is_grad_enabled():
        return image, None
    return image, Trace(samples, sigma, out.weights, out.opacity, normals, directions)


def lead(sigma: Tensor, dt: Tensor) -> Tensor:
    """Return how far before the middle of its segment light ends on average, (S,), in [0, dt / 2].

    Args:
        sigma: (S,) densities >= 0, constant over each segment.
        dt: (S,) lengths of the segments.
    """
    x = sigma * dt
    thick = x.clamp_min(0.1)  # the difference below loses its digits at a small x
    exact = 0.5 / torch.tanh(0.5 * thick) - 1 / thick
    return torch.where(x < 0.1, x * (1 / 12 - x.square() / 720), exact) * dt


def crossings(inside: Tensor, samples: Samples, width: Tensor) -> tuple[Tensor, Tensor]:
    """Return the density of the step before each sample, (S,), and the mean end of the light that ends in it, (S,).

    Where the step before is not in an occupied cell, the surface is taken to be met head-on.

    Args:
        inside: (S,) depths below an SDF's surface.
        width: () of the SDF.
    """
    t, ray = samples.t, samples.ray_index
    real = samples.dt > 0  # false for the rows that a render with a capacity leaves over
    dt = torch.where(real, samples.dt, 1.0)
    follows = torch.zeros_like(real)
    follows[1:] = real[1:] & (ray[1:] == ray[:-1]) & (t[1:] - t[:-1] < 1.5 * dt[1:])
    b = inside / width
    a = torch.where(follows, torch.cat([b[:1], b[:-1]]), b - dt / width)
    thickness = (F.softplus(b) - F.softplus(a)).clamp_min(0)  # optical, of the whole step
    kept = torch.exp(-thickness)
    # The fraction of the step at which light ends: (mean transmittance - kept) / (1 - kept), where the transmittance
    # since its start is (1 + e^a) / (1 + e^x) for an x from a to b. Where the density is nearly constant over
    # the step, this loses its digits, and the formula of a constant density is right.
    mean = (1 + torch.exp(a.clamp_max(DEEP))) * (1 - thickness / (b - a).clamp_min(LITTLE))
    crossing = ((mean - kept) / (1 - kept).clamp_min(1e-3)).clamp(0, 1)
    even = (a > DEEP) | (b - a < LITTLE) | (thickness < 1e-3)
    ends = torch.where(even, 0.5 - lead(thickness, torch.ones_like(dt)), crossing)
    return thickness / dt, t - (1 - ends) * dt


def _normals(field: Field, samples: Samples, sigma: Tensor, options: RenderOptions) -> Tensor:
    """Return outward unit normals (S, 3), 0 for samples too faint to be seen: most samples are."""
    with torch.no_grad():
        nothing = sigma.new_empty(len(sigma), 0)
        weights = field.backend.composite(sigma, samples.dt, nothing, samples.offsets, options.dark).weights
        seen = torch.nonzero(weights > options.faint * samples.dt)[:, 0]
    normals = field.normals(samples.points[seen])
    return torch.zeros_like(samples.points).index_copy(0, seen, normals)
