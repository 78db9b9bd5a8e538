"""W(t): how much each noise level counts in a loss."""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHTS = ("sigma2", "x0", "uniform", "flow")


def weight(name: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """How much a noise level counts, (B,); a function of sigma/alpha alone, so the same in every schedule.

    ``sigma2``: sigma^2 / (alpha^2 + sigma^2), DreamFusion's 1 - alpha_bar (arXiv 2209.14988, eq. 3);
    ``x0``: sigma/alpha, which makes an eps residual an x0 residual; ``uniform``: 1; ``flow``: 1 + sigma/alpha, which
    makes it the residual of the velocity eps - x that flow models predict (RFDS, arXiv 2406.03293).

    Raises:
        ValueError: unknown name.
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
