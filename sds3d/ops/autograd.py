"""The derivatives of the kernels, for backends with their own forward and backward loops.

Hash encoding is linear in the table and piecewise trilinear in the points. So three loops give every first and second
derivative except the second one in the points: `gather`, its transpose `scatter`, and `point_gradient`. Compositing has
one backward loop. A backend provides these loops as a `Loops`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sds3d.ops.reference import TERMINATION, Composite, GridSpec, check_composite, check_hash_encode


class Loops(Protocol):
    """The loops that a backend computes. All tensors are detached and contiguous."""

    def gather(self, points: Tensor, along: Tensor | None, table: Tensor, spec: GridSpec) -> Tensor:
        """Return the features (N, L * F) of points (N, 3), or, given ``along`` (N, 3), their derivative along it."""
        ...

    def scatter(self, points: Tensor, along: Tensor | None, grad: Tensor, spec: GridSpec) -> Tensor:
        """Return the table's gradient (entries, F), given grad (N, L * F): the transpose of ``gather``."""
        ...

    def point_gradient(self, points: Tensor, table: Tensor, grad: Tensor, spec: GridSpec) -> Tensor:
        """Return the points' gradient (N, 3), given grad (N, L * F)."""
        ...

    def blend(
        self, sigma: Tensor, dt: Tensor, values: Tensor, offsets: Tensor, threshold: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return weights (S,), transmittance behind each sample (S,), opacity (R,), accumulated values (R, C)."""
        ...

    def blend_backward(
        self,
        dt: Tensor,
        values: Tensor,
        offsets: Tensor,
        weights: Tensor,
        transmittance: Tensor,
        grads: tuple[Tensor, Tensor, Tensor],  # of the weights, the opacity, the accumulated values
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients in sigma (S,) and in the values (S, C)."""
        ...


def _plain(tensor: Tensor) -> Tensor:
    """Return a tensor detached and contiguous, as the loops expect it."""
    return tensor.detach().contiguous()


class _HashEncode(torch.autograd.Function):
    """The features of points; twice differentiable, except twice in the points."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, table: Tensor, spec: GridSpec, loops: Loops) -> Tensor:
        ctx.save_for_backward(points, table)
        ctx.rest = spec, loops
        return loops.gather(_plain(points), None, _plain(table), spec)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (points, table), rest = ctx.saved_tensors, ctx.rest
        in_points = None
        if ctx.needs_input_grad[0]:
            inside = (points >= 0) & (points <= 1)
            in_points = torch.where(inside, _PointGradient.apply(points, table, grad, *rest), 0)
        in_table = _TableGradient.apply(points, grad, *rest) if ctx.needs_input_grad[1] else None
        return in_points, in_table, None, None


class _TableGradient(torch.autograd.Function):
    """The gradient in the table (entries, F), linear in the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, grad: Tensor, spec: GridSpec, loops: Loops) -> Tensor:
        ctx.save_for_backward(points)
        ctx.rest = spec, loops
        return loops.scatter(_plain(points), None, _plain(grad), spec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (points,), (spec, loops) = ctx.saved_tensors, ctx.rest
        return None, loops.gather(_plain(points), None, _plain(grad), spec), None, None


class _PointGradient(torch.autograd.Function):
    """The gradient in the points (N, 3), differentiable in the table and the incoming gradient only."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, table: Tensor, grad: Tensor, spec: GridSpec, loops: Loops) -> Tensor:
        ctx.save_for_backward(points, table, grad)
        ctx.rest = spec, loops
        return loops.point_gradient(_plain(points), _plain(table), _plain(grad), spec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor | None, ...]:
        (points, table, grad, along), (spec, loops) = map(_plain, (*ctx.saved_tensors, along)), ctx.rest
        in_table = loops.scatter(points, along, grad, spec) if ctx.needs_input_grad[1] else None
        in_grad = loops.gather(points, along, table, spec) if ctx.needs_input_grad[2] else None
        return None, in_table, in_grad, None, None


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sigma: Tensor, dt: Tensor, values: Tensor, offsets: Tensor, threshold: float, loops: Loops
    ) -> tuple[Tensor, Tensor, Tensor]:
        sigma, dt, values, offsets = map(_plain, (sigma, dt, values, offsets))
        weights, transmittance, opacity, accumulated = loops.blend(sigma, dt, values, offsets, threshold)
        ctx.save_for_backward(dt, values, offsets, weights, transmittance)
        ctx.loops = loops
        return weights, opacity, accumulated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        in_sigma, in_values = ctx.loops.blend_backward(*ctx.saved_tensors, tuple(map(_plain, grads)))
        return in_sigma, None, in_values, None, None, None


def hash_encode(loops: Loops, points: Tensor, table: Tensor, spec: GridSpec) -> Tensor:
    """Compute `reference.hash_encode` by the loops."""
    check_hash_encode(points, table, spec)
    return _HashEncode.apply(points, table, spec, loops)


def hash_slope(loops: Loops, points: Tensor, table: Tensor, grad: Tensor, spec: GridSpec) -> Tensor:
    """Compute `reference.hash_slope` by the loops."""
    check_hash_encode(points, table, spec)
    points = points.detach()
    slope = _PointGradient.apply(points, table.to(points.dtype), grad.to(points.dtype), spec, loops)
    return torch.where((points >= 0) & (points <= 1), slope, 0)


def composite(
    loops: Loops,
    sigma: Tensor,  # (S,)
    dt: Tensor,  # (S,)
    values: Tensor,  # (S, C)
    offsets: Tensor,  # (R + 1,)
    threshold: float = TERMINATION,
) -> Composite:
    """Compute `reference.composite` by the loops; differentiable once in sigma and values."""
    check_composite(sigma, dt, values, offsets)
    return Composite(*_Composite.apply(sigma, dt, values, offsets, threshold, loops))
