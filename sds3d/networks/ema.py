"""A running mean of a network's weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """Exponential moving average of parameters. The decay is smaller in the first steps, so the average does not lag.

    Args:
        module: the network that is trained; ``self.module`` is the averaged copy.
        decay: final decay of the average.
    """

    def __init__(self, module: M, decay: float = 0.998):
        self.module: M = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards ``module`` after optimiser step ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)
