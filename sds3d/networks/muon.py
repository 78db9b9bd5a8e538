"""Muon: momentum whose step is orthogonal, for the matrices and convolutions of a network.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the step's size follows Liu et al.,
"Muon is scalable for LLM training" (arXiv 2502.16982, eq. 4), so that AdamW's learning rates fit.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the odd quintic that drives singular values towards 1


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Near-orthogonal matrices with the singular vectors of ``x``, (B, M, N) with M <= N -> (B, M, N).

    Newton-Schulz iteration on the M x M Gram matrices: every iterate is a polynomial of x xᵀ times x, so the long
    side is touched only twice. Singular values end between about 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    gram = x @ x.mT
    norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt()[:, None, None] + 1e-12
    gram = gram / norm**2
    product: Tensor | None = None
    for _ in range(steps):
        factor = b * gram + c * gram @ gram
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        gram = factor @ gram @ factor
    assert product is not None, "at least one step"
    return product / norm @ x


def matrix(x: Tensor) -> Tensor:
    """A weight as a view (M, N) with M <= N; a convolution's inputs and its window share one side."""
    x = x.permute(0, 2, 3, 1).view(len(x), -1) if x.ndim == 4 else x
    return x.mT if x.shape[0] > x.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal; weights of one shape are stepped together.

    Args:
        parameters: matrices (M, N) and convolutions (O, I, H, W) in channels-last memory.
        lr: as for AdamW: the step's root mean square is about 0.2 lr.
        momentum: decay of the gradients' running sum.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-3, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take one step along the gradients of the parameters that have one."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}  # weights and their gradients
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(matrix(p).shape, []).append((p, p.grad))
            for shape, weights in shapes.items():
                rows = []
                for p, grad in weights:
                    if "sum" not in self.state[p]:
                        self.state[p]["sum"] = torch.zeros_like(p)
                    total = self.state[p]["sum"].mul_(group["momentum"]).add_(grad)
                    rows.append(matrix(grad).add(matrix(total), alpha=group["momentum"]))
                steps = orthogonal(torch.stack(rows)) * (-0.2 * group["lr"] * max(shape) ** 0.5)
                for (p, _), step in zip(weights, steps):
                    matrix(p).add_(step)
