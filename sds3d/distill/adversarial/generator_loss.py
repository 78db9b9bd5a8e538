"""The adversarial objective: to be taken for real by a discriminator (DMD2, arXiv 2405.14867, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sds3d.distill.core import Judgement
from sds3d.students.base import Draw


class Discriminator(Protocol):
    """See `sds3d.distill.discriminators.TrainedDiscriminator`."""

    def verdict(self, x: Tensor, prompts: list[str], rng: torch.Generator) -> Tensor:
        """How real clean x (B, C, h, w) look, (B,); differentiable in x."""
        ...


@dataclass
class Adversarial:
    """weight * softplus(-D(x_t)), summed over a sample's numbers as the core's loss is (so that published weights,
    which are for means, hold), mean over the batch.

    Args:
        judge: the discriminator; only the student gets gradients.
        weight: 3e-3 is the paper's.
    """

    judge: Discriminator
    weight: float

    def __call__(self, draw: Draw, step: int, rng: torch.Generator) -> Judgement:
        """The loss on a draw; see `sds3d.train.Objective`."""
        x = draw.images
        assert draw.encoded, "an adversarial objective takes a generator's x"
        with torch.enable_grad():
            apart = x.detach().requires_grad_(True)
            verdict = self.judge.verdict(apart, draw.prompts, rng)
            loss = self.weight * x[0].numel() * F.softplus(-verdict).mean()
            (slope,) = torch.autograd.grad(loss, apart)
        value = loss.detach() + (slope * (x - x.detach())).sum()  # the loss, with its gradient in x alone
        return Judgement(value, {"verdict": verdict.detach().mean()})
