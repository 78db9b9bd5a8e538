"""The field of a scene: density and colour at every point of the box, and the background behind it.

A multi-resolution hash grid (Instant-NGP, arXiv 2201.05989, section 3) feeds one hidden layer, which serves both
density and colour:

    f(x) = hash_encode((x + 1) / 2)                             (N, levels * features)
    o(x) = W2 relu(W1 f(x) + b1) + b2                           (N, 4)
    density = softplus(gain o_0 + blob(x)),  colour = sigmoid(o_1..3)
    blob(x) = strength * (1 - |x| / radius)                     (Magic3D, arXiv 2211.10440, section 4)

or, as an SDF, with the distance d(x) to the surface, negative inside, and a width b:

    -d(x) = gain o_0 + radius - |x|,  density = sigmoid(-d / b) / b

This is the density that light meets which goes straight into the surface. A render takes less where light grazes it,
see ``render.py``.

b2 starts at -W2 relu(b1), so that a new field is the blob, or a ball, in middle grey. Density has to change by tens
while colour changes by ones, and distance by tenths; the gain lets all follow at Adam's step size. Points are world
points in the box [-1, 1]^3 (see cameras.py); density is per scene unit of length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sds3d.ops import Backend, GridSpec
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import Within, shown
from sds3d.runtime.transfer import onto

# Corners of a tetrahedron: sum_i k_i k_i^T = 4 I, so sum_i k_i f(x + h k_i) = 4 h grad f + O(h^3 for odd terms).
_TETRAHEDRON = ((1.0, -1.0, -1.0), (-1.0, -1.0, 1.0), (-1.0, 1.0, -1.0), (1.0, 1.0, 1.0))
_WIDTH = Ramp(0, 0.1, 0.01, 300)
ONLY_FOR = {"density_gain": "density", "blob_strength": "density", "distance_gain": "sdf", "width": "sdf"}
LARGEST = 2**28  # parameters of a hash grid: 1 GiB, and gradients and Adam's moments take three times that again


@dataclass(frozen=True)
class FieldConfig:
    """Sizes of the hash grid and the MLP, what they say about the shape, and the blob or ball from which it starts.

    Args:
        levels, features, log2_table, base, finest: the hash grid (see ops.GridSpec).
        open_levels: number of open levels at each step; closed levels give zeros. None opens all levels always.
        hidden: width of the hidden layer.
        density_gain: for kind "density": factor of the network's density output, > 0.
        blob_strength: for kind "density": the blob's pre-activation at its centre.
        blob_radius: distance, in scene units, at which the blob's pre-activation is 0 (density 0.69), or the ball ends.
        normals: "analytic" takes the gradient at the point itself; "differences" takes differences half a finest cell
            around it, in twice the time.
        kind: "density", or "sdf": the signed distance to a surface, from which the density follows.
        distance_gain: for kind "sdf": factor of the network's distance output, > 0, in scene units.
        width: for kind "sdf", by step: the density falls from half its largest value, 1 / width, at the surface to a
            quarter of that one width, in scene units, outside.
    """

    levels: Annotated[int, Within(1, 64)] = 12
    features: Annotated[int, Within(1, 64)] = 2
    log2_table: Annotated[int, Within(3, 24)] = 15
    base: Annotated[int, Within(1, 4096)] = 16
    finest: Annotated[int, Within(1, 65_536)] = 128
    open_levels: Annotated[Ramp, Within(0, 64)] | None = None
    hidden: Annotated[int, Within(1, 4096)] = 32
    density_gain: Annotated[float, Within(0, 1e6, above=True)] = 10.0
    blob_strength: Annotated[float, Within(-1e4, 1e4)] = 10.0
    blob_radius: Annotated[float, Within(1e-3, 1e3)] = 0.5
    normals: Literal["analytic", "differences"] = "analytic"
    kind: Literal["density", "sdf"] = "density"
    distance_gain: Annotated[float, Within(0, 1e6, above=True)] = 0.3
    width: Annotated[Ramp, Within(1e-4, 10)] = _WIDTH

    def __post_init__(self):
        if self.hidden < 1:
            raise ValueError(f"field.hidden is {self.hidden}; give a width of at least 1 (32 is usual)")
        if not math.isfinite(self.blob_strength):
            raise ValueError(f"field.blob_strength is {self.blob_strength}; give a number (10)")
        if not 0 < self.density_gain < math.inf:
            raise ValueError(f"field.density_gain is {self.density_gain}; give a factor above 0 (10)")
        if not 0 < self.blob_radius < math.inf:
            raise ValueError(f"field.blob_radius is {self.blob_radius}; give a radius above 0, in scene units (0.5)")
        if self.normals not in ("analytic", "differences"):
            raise ValueError(f"field.normals is {self.normals!r}; give analytic or differences")
        if not 0 < self.distance_gain < math.inf:
            raise ValueError(f"field.distance_gain is {self.distance_gain}; give a factor above 0 (0.3)")
        if not min(self.width.v0, self.width.v1) > 0:
            raise ValueError(f"field.width is {self.width}; give widths above 0, in scene units (0.02)")
        self._check_kind()
        numbers = self.grid().entries * self.features
        if numbers > LARGEST:
            raise ValueError(
                f"the hash grid of field would have {numbers:.2g} parameters, and at most {LARGEST:.2g} are accepted; "
                "lower field.levels, field.features or field.log2_table"
            )

    def _check_kind(self) -> None:
        if self.kind not in ("density", "sdf"):
            raise ValueError(f"field.kind is {self.kind!r}; give density or sdf")
        defaults = {f.name: f.default for f in fields(self)}
        for name, kind in ONLY_FOR.items():
            if kind != self.kind and getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"field.{name} is for field.kind={kind}, and field.kind is {self.kind}; leave field.{name} out "
                    f"(its default is {shown(defaults[name])})"
                )

    def grid(self) -> GridSpec:
        """Return the hash grid of these sizes."""
        return GridSpec(self.levels, self.features, self.log2_table, self.base, self.finest)


def _logistic(inside: Tensor, width: Tensor) -> Tensor:
    """Return the densities at depths ``inside`` (N,) below the surface, negative outside: a logistic CDF over width."""
    return torch.sigmoid(inside / width) / width


class _Head(Function):
    """Density and colour of features (N, I) and blob (N,), with a hand-written backward: autograd takes 50 % longer.

    With ``sdf`` the first is the depth below the surface.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, blob: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, sdf: bool
    ) -> tuple[Tensor, Tensor]:
        hidden = F.linear(features, w1, b1).relu_()
        out = F.linear(hidden, w2, b2)
        logit, rgb = out[:, 0] + blob, out[:, 1:].sigmoid()
        sigma = logit if sdf else F.softplus(logit)
        ctx.sdf = sdf
        ctx.save_for_backward(features, hidden, w1, w2, sigma, rgb)
        return sigma, rgb

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sigma: Tensor, grad_rgb: Tensor) -> tuple[Tensor | None, ...]:
        features, hidden, w1, w2, sigma, rgb = ctx.saved_tensors
        grad = torch.empty(len(features), 4, dtype=features.dtype, device=features.device)
        if ctx.sdf:
            grad[:, 0] = grad_sigma
        else:
            torch.mul(grad_sigma, -torch.expm1(-sigma), out=grad[:, 0])  # softplus' = sigmoid = 1 - exp(-softplus)
        torch.mul(grad_rgb, rgb * (1 - rgb), out=grad[:, 1:])
        grad_hidden = torch.ops.aten.threshold_backward(grad @ w2, hidden, 0)
        grad_w1, grad_w2 = grad_hidden.T @ features, grad.T @ hidden
        return grad_hidden @ w1, grad[:, 0], grad_w1, grad_hidden.sum(0), grad_w2, grad.sum(0), None


class Field(nn.Module):
    """Density and colour of a scene; with ``config.kind`` "sdf" the density is that of a signed distance.

    Args:
        config: sizes and the blob.
        backend: kernels (ops.choose). They are not part of the state, so a checkpoint loads with every backend.
        rng: CPU generator for the initial values.
    """

    mask: Tensor  # (inputs,) in [0, 1]: how far each feature's level is open
    corners: Tensor  # (4, 3) of the tetrahedron
    gain: Tensor  # (4,) factors of the outputs
    width: Tensor | None  # () of an SDF at the last step opened

    def __init__(self, config: FieldConfig, backend: Backend, rng: torch.Generator):
        super().__init__()
        self.config, self.spec, self.backend = config, config.grid(), backend
        inputs, hidden = self.spec.width, config.hidden

        def uniform(bound: float, *shape: int) -> nn.Parameter:
            return nn.Parameter((torch.rand(*shape, generator=rng) * 2 - 1) * bound)

        self.table = uniform(1e-4, self.spec.entries, self.spec.features)
        self.w1 = uniform(math.sqrt(3.0 / inputs), hidden, inputs)  # features start tiny: plain fan-in scale
        self.b1 = uniform(1 / math.sqrt(inputs), hidden)
        self.w2 = uniform(1 / math.sqrt(hidden), 4, hidden)
        self.b2 = nn.Parameter(-(self.w2 @ self.b1.relu()).detach())
        self.register_buffer("mask", torch.ones(inputs))
        self.register_buffer("corners", torch.tensor(_TETRAHEDRON), persistent=False)  # (4, 3)
        sdf = config.kind == "sdf"
        gain, self._strength = (
            (config.distance_gain, config.blob_radius) if sdf else (config.density_gain, config.blob_strength)
        )
        self.register_buffer("gain", torch.tensor([gain, 1.0, 1.0, 1.0]), persistent=False)
        self.register_buffer("width", torch.tensor(config.width(0)) if sdf else None)

    def open(self, step: int) -> None:
        """Open the first ``config.open_levels(step)`` levels; a fraction opens a level partly. Set an SDF's width."""
        if self.width is not None:
            self.width.fill_(self.config.width(step))
        if self.config.open_levels is None:
            return
        level = torch.arange(self.spec.levels, dtype=torch.float32).repeat_interleave(self.spec.features)
        self.mask.copy_(onto((self.config.open_levels(step) - level).clamp(0, 1), self.mask.device))

    def blob(self, points: Tensor) -> Tensor:
        """Return the blob's pre-activation (N,) at points (N, 3); of an SDF, minus the distance to the ball."""
        return self._strength - points.norm(dim=-1) * (self._strength / self.config.blob_radius)

    def _encode(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, inputs) at points (N, 3), and the first layer's weight with closed levels set to 0."""
        return self.backend.hash_encode(points * 0.5 + 0.5, self.table, self.spec), self._opened()

    def _opened(self) -> Tensor:
        """Return the first layer's weight with closed levels set to 0."""
        return self.w1 if self.config.open_levels is None else self.w1 * self.mask

    def logit(self, points: Tensor) -> Tensor:
        """Return the density before the softplus, or minus the signed distance, (N,), at points (N, 3) in the box."""
        features, w1 = self._encode(points)
        hidden = F.linear(features, w1, self.b1).relu_()
        gain = self.gain[:1]
        return F.linear(hidden, self.w2[:1] * gain[:, None], self.b2[:1] * gain).squeeze(-1) + self.blob(points)

    def density(self, points: Tensor) -> Tensor:
        """Return the density (N,), >= 0, per scene unit, at points (N, 3) in the box."""
        logit = self.logit(points)
        return F.softplus(logit) if self.width is None else _logistic(logit, self.width)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return density (N,), >= 0, and colour (N, 3) in [0, 1] at points (N, 3) in the box."""
        sigma, colour = self.raw(points)
        return (sigma if self.width is None else _logistic(sigma, self.width)), colour

    def raw(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return density (N,), or, of an SDF, the depth below the surface (N,), and colour (N, 3) at points (N, 3)."""
        features, w1 = self._encode(points)
        w2, b2 = self.w2 * self.gain[:, None], self.b2 * self.gain
        return _Head.apply(features, self.blob(points), w1, self.b1, w2, b2, self.width is not None)

    def slope(self, points: Tensor) -> Tensor:
        """Return the gradient (N, 3) of ``logit`` in the points (N, 3), differentiable in the parameters.

        W1^T (relu' w2) is constant in the points almost everywhere, and so are its derivatives in the features. So the
        features are needed for relu' alone, without a graph.
        """
        places, w1 = points * 0.5 + 0.5, self._opened()
        with torch.no_grad():
            hidden = F.linear(self.backend.hash_encode(places, self.table, self.spec), w1, self.b1)
            active = (hidden > 0).to(w1.dtype)
        incoming = active @ (w1 * (self.w2[0] * self.gain[0])[:, None])  # (N, inputs)
        slope = self.backend.hash_slope(places, self.table, incoming, self.spec)
        blob = F.normalize(points, dim=-1) * (self._strength / self.config.blob_radius)
        return slope * 0.5 - blob

    def normals(self, points: Tensor) -> Tensor:
        """Return outward unit normals (N, 3) at points (N, 3): minus the normalised gradient of the density.

        It is that of the density before the softplus, which has the same direction and does not saturate. With
        ``config.normals`` "differences" it is estimated at the four corners of a tetrahedron, half a finest cell away.
        Either way the normals are differentiable by one backward pass.
        """
        if self.config.normals == "analytic":
            return -F.normalize(self.slope(points), dim=-1, eps=1e-12)
        corners = self.corners.to(points.dtype)
        step = 1.0 / self.spec.finest
        around = points[None] + step * corners[:, None]  # (4, N, 3)
        values = self.logit(around.view(-1, 3)).view(4, -1)
        return -F.normalize(values.T @ corners, dim=-1, eps=1e-12)


class LearnedBackground(nn.Module):
    """A learned background: second-order spherical harmonics of the ray's direction, then a sigmoid.

    Args:
        colour: RGB in [0, 1] at the start, the same in every direction.
    """

    def __init__(self, colour: tuple[float, float, float] = (0.95, 0.95, 0.95)):
        super().__init__()
        coefficients = torch.zeros(9, 3)
        coefficients[0] = torch.logit(torch.tensor(colour).clamp(0.02, 0.98))
        self.coefficients = nn.Parameter(coefficients)

    def forward(self, directions: Tensor) -> Tensor:
        """Return colours (R, 3) in [0, 1] for unit directions (R, 3)."""
        x, y, z = directions.unbind(-1)
        basis = torch.stack([torch.ones_like(x), x, y, z, x * y, y * z, x * z, x * x - y * y, 3 * z * z - 1], -1)
        return (basis @ self.coefficients).sigmoid()
