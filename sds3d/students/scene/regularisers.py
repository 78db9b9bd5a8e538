"""The regularisers of a scene: named scalars of one render, each weighted by its own ``lambda_<name>``.

All are means over rays or samples, so their size does not depend on the resolution. The distillation loss is a sum over
pixels (see sds3d/distill/core.py), so with a lambda of 64 * 64 one ray of a 64 x 64 render weighs as much as one pixel.

    sparsity          mean_r sqrt(o_r^2 + 0.01) - 0.1                       DreamFusion, arXiv 2209.14988, appendix
    opacity_entropy   mean_r H(o_r), binary entropy in nats                 rays either hit or miss: no fog
    orientation       mean_r sum_i sg(w_i) max(0, n_i . d)^2                Ref-NeRF, arXiv 2112.03907, eq. 11
    total_variation   mean_i |a(x_i) - a(x_i + u)|, a = 1 - exp(-sigma step), at jittered neighbours
    distortion        mean_r sum_ij w_i w_j |t_i - t_j| + sum_i w_i^2 dt_i/3    Mip-NeRF 360, arXiv 2111.12077, eq. 15
    eikonal           mean_i (|grad d(x_i)| - 1)^2, for an SDF d             IGR, arXiv 2002.10099, eq. 4
    smooth_normals    mean_i |n(x_i) - n(x_i + u)|, at jittered neighbours of seen points
    margin            mean_r sum_i w_i max(0, (|x_i|_inf - 0.9) / 0.1)^2    keeps matter away from the faces of the box
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated

import torch
from torch import Tensor

from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import Within
from sds3d.runtime.transfer import onto
from sds3d.students.scene.field import Field
from sds3d.students.scene.render import Trace

_OFF = Ramp.constant(0.0)
ONLY_FOR = {"lambda_eikonal": "sdf"}  # kind of field that a weight needs
_NEIGHBOURS = 2048  # pairs of points at which total variation and the smoothness of normals are measured


@dataclass(frozen=True)
class RegulariserConfig:
    """Weight of each regulariser, by step. A regulariser with weight 0 is not computed."""

    lambda_sparsity: Annotated[Ramp, Within(0, 1e9)] = field(default_factory=lambda: Ramp.constant(20.0))
    lambda_opacity_entropy: Annotated[Ramp, Within(0, 1e9)] = field(default_factory=lambda: Ramp(0, 0.0, 40.0, 300))
    lambda_orientation: Annotated[Ramp, Within(0, 1e9)] = _OFF
    lambda_total_variation: Annotated[Ramp, Within(0, 1e9)] = _OFF
    lambda_distortion: Annotated[Ramp, Within(0, 1e9)] = _OFF
    lambda_margin: Annotated[Ramp, Within(0, 1e9)] = field(default_factory=lambda: Ramp.constant(100.0))
    lambda_eikonal: Annotated[Ramp, Within(0, 1e9)] = _OFF
    lambda_smooth_normals: Annotated[Ramp, Within(0, 1e9)] = _OFF

    def check(self, kind: str) -> None:
        """Raise ValueError if a weight needs another kind of field."""
        for name, only in ONLY_FOR.items():
            if kind != only and getattr(self, name) != _OFF:
                raise ValueError(
                    f"regularise.{name} is for field.kind={only}, and field.kind is {kind}; give field.kind={only}, "
                    "or leave it out"
                )

    def ramps(self) -> dict[str, Ramp]:
        """Return the weights by the regularisers' names, without "lambda_"."""
        return {f.name.removeprefix("lambda_"): getattr(self, f.name) for f in fields(self)}

    def active(self, step: float) -> set[str]:
        """Return the names of the regularisers whose weight at a step is not 0."""
        return {name for name, ramp in self.ramps().items() if ramp(step) != 0}


def sparsity(opacity: Tensor) -> Tensor:
    """Return the mean smoothed absolute opacity of rays (R,); 0 for an empty scene."""
    return (opacity.square() + 0.01).sqrt().mean() - 0.1


def opacity_entropy(opacity: Tensor) -> Tensor:
    """Return the mean binary entropy, in nats, of the opacities (R,); near 0 if every opacity is 0 or 1."""
    p = opacity.clamp(1e-4, 1 - 1e-4)
    return -(p * p.log() + (1 - p) * torch.log1p(-p)).mean()


def orientation(trace: Trace) -> Tensor:
    """Return the mean over rays of the weight of samples whose normals point away from the camera."""
    assert trace.normals is not None, "orientation needs a render with normals"
    away = (trace.normals * trace.directions[trace.samples.ray_index]).sum(-1).clamp_min(0)
    return (trace.weights.detach() * away.square()).sum() / trace.opacity.shape[0]


def distortion(trace: Trace) -> Tensor:
    """Return the mean spread of the weights along a ray, in scene units; 0 for one thin surface."""
    t, dt, ray, offsets = trace.samples.t, trace.samples.dt, trace.samples.ray_index, trace.samples.offsets

    def before(x: Tensor) -> Tensor:  # (S,) sum of x over the earlier samples of the same ray
        total = x.double().cumsum(0)
        start = torch.cat([total.new_zeros(1), total])[offsets[:-1]]
        return (total - x - start[ray]).to(x.dtype)

    w = trace.weights
    pairs = 2 * (w * (t * before(w) - before(w * t))).sum()
    return (pairs + (w.square() * dt).sum() / 3) / trace.opacity.shape[0]


def margin(trace: Trace) -> Tensor:
    """Return the mean over rays of the weight within 0.1 of the faces of the box."""
    near = ((trace.samples.points.abs().amax(-1) - 0.9) / 0.1).clamp_min(0).square()
    return (trace.weights * near).sum() / trace.opacity.shape[0]


def total_variation(field: Field, trace: Trace, rng: torch.Generator) -> Tensor:
    """Return the mean difference of opacity per step between samples and neighbours within one finest cell."""
    points = trace.samples.points
    if not points.shape[0]:
        return trace.opacity.sum()  # 0, with a graph
    uniform = onto(torch.rand(_NEIGHBOURS, generator=rng, dtype=torch.float64), points.device)
    chosen = (uniform * trace.samples.offsets[-1]).long()
    shift = (onto(torch.rand(_NEIGHBOURS, 3, generator=rng), points.device) * 2 - 1) * (2 / field.spec.finest)
    here = points[chosen]
    density = field.density(torch.cat([here, (here + shift).clamp_(-1, 1)]))
    opaque = -torch.expm1(-density * trace.samples.dt[0])
    return (opaque[:_NEIGHBOURS] - opaque[_NEIGHBOURS:]).abs().mean()


def eikonal(field: Field, trace: Trace, rng: torch.Generator) -> Tensor:
    """Return how far the slope of an SDF is from 1, at samples and at as many points anywhere in the box."""
    points = trace.samples.points
    anywhere = onto(torch.rand(_NEIGHBOURS, 3, generator=rng), points.device) * 2 - 1
    uniform = onto(torch.rand(_NEIGHBOURS, generator=rng, dtype=torch.float64), points.device)
    if points.shape[0]:
        anywhere = torch.cat([anywhere, points[(uniform * trace.samples.offsets[-1]).long()]])
    return (field.slope(anywhere).norm(dim=-1) - 1).square().mean()


def smooth_normals(field: Field, trace: Trace, rng: torch.Generator) -> Tensor:
    """Return the mean difference of the normals of seen points, drawn by weight, and of neighbours within one finest
    cell."""
    points, total = trace.samples.points, trace.weights.detach().double().cumsum(0)
    if not points.shape[0]:
        return trace.opacity.sum()  # 0, with a graph
    uniform = onto(torch.rand(_NEIGHBOURS, generator=rng, dtype=torch.float64), points.device)
    chosen = torch.searchsorted(total, uniform * total[-1], right=True).clamp_(max=len(points) - 1)
    shift = (onto(torch.rand(_NEIGHBOURS, 3, generator=rng), points.device) * 2 - 1) * (2 / field.spec.finest)
    here = points[chosen]
    normals = field.normals(torch.cat([here, (here + shift).clamp_(-1, 1)]))
    return (normals[:_NEIGHBOURS] - normals[_NEIGHBOURS:]).norm(dim=-1).mean()


def measure(names: set[str], field: Field, trace: Trace, rng: torch.Generator) -> dict[str, Tensor]:
    """Return the named regularisers, unweighted, by name.

    Args:
        names: fields of RegulariserConfig, without "lambda_".
        rng: generator for the points of total_variation, eikonal and smooth_normals.
    """
    terms = {
        "sparsity": lambda: sparsity(trace.opacity),
        "opacity_entropy": lambda: opacity_entropy(trace.opacity),
        "orientation": lambda: orientation(trace),
        "total_variation": lambda: total_variation(field, trace, rng),
        "distortion": lambda: distortion(trace),
        "margin": lambda: margin(trace),
        "eikonal": lambda: eikonal(field, trace, rng),
        "smooth_normals": lambda: smooth_normals(field, trace, rng),
    }
    return {name: term() for name, term in terms.items() if name in names}
