"""The regression objective: draw from a pair's noise what the teacher made of it (DMD, arXiv 2311.18828, eq. 9)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sds3d.distill.core import Judgement
from sds3d.distill.pairs import Pairs
from sds3d.runtime.distributed import Processes

Distance = Callable[[Tensor, Tensor], Tensor]  # x and what it should be, (B, C, h, w) each -> (B,)


@dataclass
class Regression:
    """weight * distance(G(z), y), times the numbers in a sample as the core's loss is a sum over them, mean over the
    batch.

    Args:
        pairs: z and y.
        paint: G: noise (B, C, h, w) and B prompts -> x, with gradients.
        distance: see `sds3d.distill.perceptual`.
        weight: 0.25 is the paper's.
        batch: pairs a step.
        processes: of them, where several processes train.

    Raises:
        ValueError: the batch cannot be shared evenly.
    """

    pairs: Pairs
    paint: Callable[[Tensor, list[str]], Tensor]
    distance: Distance
    weight: float
    batch: int
    processes: Processes = Processes()

    def __post_init__(self):
        self.processes.local_batch(self.batch)

    def judge_alone(self, step: int, rng: torch.Generator) -> Judgement:
        """The loss on a batch of the pairs, which needs no draw."""
        index = self.processes.randint(len(self.pairs.prompts), self.processes.local_batch(self.batch), rng)
        chosen = self.pairs[index]
        apart = self.distance(self.paint(chosen.noise, chosen.prompts), chosen.x).mean()
        return Judgement(self.weight * chosen.x[0].numel() * apart, {"distance": apart.detach()})
