"""The generator's adversarial loss against a discriminator (DMD2, arXiv 2405.14867, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sds3d.distill.core import ObjectiveResult
from sds3d.students.base import Draw


class Discriminator(Protocol):
    """See `sds3d.distill.discriminators.TrainedDiscriminator`."""

    def logits(self, x: Tensor, prompts: list[str], rng: torch.Generator) -> Tensor:
        """Return logits (B,), positive for real, of clean x (B, C, h, w); differentiable in x."""
        ...


@dataclass
class Adversarial:
    """The loss weight * n * softplus(-D(x_t)), mean over the batch.

    The factor n is the number of values in a sample: the core's loss is a sum over them, and published weights are for
    means.

    Args:
        discriminator: the discriminator, which gets no gradients.
        weight: 3e-3 in the paper.
    """

    discriminator: Discriminator
    weight: float

    def __call__(self, draw: Draw, step: int, rng: torch.Generator) -> ObjectiveResult:
        """Return the loss on a draw; see `sds3d.train.Objective`."""
        x = draw.images
        assert draw.encoded, "an adversarial objective takes a generator's x"
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            logits = self.discriminator.logits(leaf, draw.prompts, rng)
            loss = self.weight * x[0].numel() * F.softplus(-logits).mean()
            (slope,) = torch.autograd.grad(loss, leaf)
        value = loss.detach() + (slope * (x - x.detach())).sum()  # the loss, with a gradient on x alone
        return ObjectiveResult(value, {"verdict": logits.detach().mean()})
