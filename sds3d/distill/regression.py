"""The regression objective: draw the teacher's sample from a pair's noise (DMD, arXiv 2311.18828, eq. 9)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sds3d.distill.core import ObjectiveResult
from sds3d.distill.pairs import Pairs
from sds3d.runtime.distributed import Processes

Distance = Callable[[Tensor, Tensor], Tensor]  # x and its target, (B, C, h, w) each -> (B,)


@dataclass
class Regression:
    """The loss weight * n * distance(G(z), y), mean over the batch.

    The factor n is the number of values in a sample: the core's loss is a sum over them.

    Args:
        pairs: noise z and samples y.
        paint: the generator G: noise (B, C, h, w) and B prompts -> x (B, C, h, w), with gradients.
        distance: see `sds3d.distill.perceptual`.
        weight: 0.25 in the paper.
        batch: pairs in a step.
        processes: the processes that share a batch.

    Raises:
        ValueError: the processes cannot share the batch evenly.
    """

    pairs: Pairs
    paint: Callable[[Tensor, list[str]], Tensor]
    distance: Distance
    weight: float
    batch: int
    processes: Processes = Processes()

    def __post_init__(self):
        self.processes.local_batch(self.batch)

    def evaluate_without_draw(self, step: int, rng: torch.Generator) -> ObjectiveResult:
        """Return the loss on a batch of pairs."""
        index = self.processes.randint(len(self.pairs.prompts), self.processes.local_batch(self.batch), rng)
        chosen = self.pairs[index]
        distance = self.distance(self.paint(chosen.noise, chosen.prompts), chosen.x).mean()
        return ObjectiveResult(self.weight * chosen.x[0].numel() * distance, {"distance": distance.detach()})
