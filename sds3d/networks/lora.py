"""Low-rank changes to a frozen network (Hu et al., LoRA, arXiv 2106.09685, eq. 3): W + (scale / rank) B A."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class LoRA(nn.Module):
    """A frozen network with trainable low-rank changes to its matrices and convolutions.

    The network's weights are shared, not copied, and ``network`` is not modified. The parameters and the state of this
    module are the changes alone. B starts at zero, so the outputs equal the network's at first.

    Args:
        network: any module; its weights get no gradient here.
        rank: rank of every change. Weights whose shorter side is not above the rank are not changed.
        scale: the change is multiplied by scale / rank.
        rng: generator of A's initial values.

    Raises:
        ValueError: the rank is below 1, or no weight's shorter side is above it.
    """

    def __init__(self, network: nn.Module, rank: int = 8, scale: float = 8.0, rng: torch.Generator | None = None):
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRA's rank is {rank}; give at least 1 (8 is usual)")
        self._network = [network]  # in a list: not a submodule, so not in this module's state or parameters
        self.factor = scale / rank
        self.down, self.up, self.names = nn.ParameterList(), nn.ParameterList(), []
        for name, weight in network.named_parameters():
            if weight.ndim in (2, 4) and min(len(weight), weight[0].numel()) > rank:
                inputs = weight[0].numel()
                a = torch.randn((rank, inputs), generator=rng) / math.sqrt(inputs)
                self.down.append(nn.Parameter(a.to(weight.device)))
                self.up.append(nn.Parameter(weight.new_zeros(len(weight), rank, dtype=torch.float32)))
                self.names.append(name)
        if not self.names:
            raise ValueError(f"LoRA's rank is {rank}, and no weight of the network is wider: give a smaller one")

    def weights(self) -> dict[str, Tensor]:
        """Return the changed weights by name."""
        frozen = dict(self._network[0].named_parameters())
        return {
            name: frozen[name].detach() + self.factor * (up @ down).view(frozen[name].shape)
            for name, up, down in zip(self.names, self.up, self.down, strict=True)
        }

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Call the network with the changed weights."""
        return functional_call(self._network[0], self.weights(), arguments, named)
