"""Weights W(t) of noise levels in a loss."""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHTS = ("sigma2", "x0", "uniform", "flow")


def weight(name: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the weights (B,) of noise levels. They depend on sigma/alpha alone, so they suit every schedule.

    ``sigma2``: sigma^2 / (alpha^2 + sigma^2), DreamFusion's 1 - alpha_bar (arXiv 2209.14988, eq. 3);
    ``x0``: sigma/alpha, which turns an eps residual into an x0 residual; ``uniform``: 1; ``flow``: 1 + sigma/alpha,
    which turns it into a residual of the velocity eps - x that flow models predict (RFDS, arXiv 2406.03293).

    Raises:
        ValueError: the name is unknown.
    """
    if name == "sigma2":
        return sigma**2 / (alpha**2 + sigma**2)
    if name == "x0":
        return sigma / alpha
    if name == "uniform":
        return torch.ones_like(sigma)
    if name == "flow":
        return 1 + sigma / alpha
    raise ValueError(f"unknown weight {name!r}; accepted: {', '.join(WEIGHTS)}")
