"""Muon: momentum with orthogonalised steps, for the matrices and convolutions of a network.

See Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024). The step size follows Liu et al.,
"Muon is scalable for LLM training" (arXiv 2502.16982, eq. 4), so that learning rates are comparable to AdamW's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the odd quintic polynomial that moves singular values towards 1


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Return near-orthogonal matrices (B, M, N) with the singular vectors of ``x`` (B, M, N), M <= N.

    Runs the Newton-Schulz iteration on the M x M Gram matrices: every iterate is a polynomial of x xᵀ times x, so only
    two products involve the long side N. The singular values end between about 0.7 and 1.2.
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
    """Return a view (M, N), M <= N, of a weight; input channels and kernel of a convolution are flattened together."""
    x = x.permute(0, 2, 3, 1).view(len(x), -1) if x.ndim == 4 else x
    return x.mT if x.shape[0] > x.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalised steps. Weights of the same shape are updated in one batch.

    Args:
        parameters: matrices (M, N) and convolutions (O, I, H, W) in channels-last memory.
        lr: learning rate as for AdamW: the root mean square of a step is about 0.2 lr.
        momentum: decay of the running sum of gradients.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-3, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Perform one optimisation step on the parameters that have a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}  # shape -> weights and their gradients
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
