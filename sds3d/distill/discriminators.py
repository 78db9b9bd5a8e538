"""A critic with a discriminator between real images and the student's (DMD2, arXiv 2405.14867, section 4.3).

Real and drawn images are noised to t of the same distribution. The discriminator D is a small head on the critic's
feature maps of the lowest resolution. Critic and head are trained together, on the denoising loss plus

    softplus(-D(real_t)) + softplus(D(drawn_t))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sds3d.diffusion.noise import noised
from sds3d.distill.critics import CriticConfig, Featured, TrainedCritic
from sds3d.networks.discriminator_head import DiscriminatorHead
from sds3d.runtime.distributed import Processes
from sds3d.runtime.transfer import onto
from sds3d.students.base import Draw

RealSampler = Callable[[int, torch.Generator], tuple[Tensor, list[str]]]  # B, rng -> real x (B, C, h, w), B prompts


class TrainedDiscriminator(TrainedCritic):
    """A trained critic with a discriminator head.

    Args:
        teacher, config, rng, processes: see ``TrainedCritic``.
        real: draws real images.
        weight: weight of the discriminator's loss; the denoising loss has weight 1.
    """

    def __init__(
        self,
        teacher: Featured,
        config: CriticConfig,
        rng: torch.Generator,
        real: RealSampler,
        weight: float,
        processes: Processes = Processes(),
    ):
        self.real, self.weight, self.featured = real, weight, teacher
        like = next(teacher.network.parameters())
        dtype = torch.promote_types(like.dtype, torch.float32)  # small steps are lost on weights in half precision
        with torch.random.fork_rng(devices=[]):  # modules draw their initial weights from the global stream
            torch.manual_seed(rng.initial_seed())
            self.head = DiscriminatorHead(teacher.feature_width).to(like.device, dtype)
        super().__init__(teacher, config, rng, processes)

    def parts(self) -> list[nn.Module]:
        """Return the modules of `TrainedCritic.parts` and the head."""
        return [*super().parts(), self.head]

    def logits(self, x: Tensor, prompts: list[str], rng: torch.Generator) -> Tensor:
        """Return logits (B,), positive for real, of clean x (B, C, h, w) noised to random t; differentiable in x."""
        t = onto(self.processes.rand((len(x),), rng), x.device).to(x.dtype) * self.teacher.schedule.t_noisiest
        noise = onto(self.processes.randn(x.shape, rng, x.dtype), x.device)
        x_t = noised(x, noise, *self.teacher.schedule.alpha_sigma(t))
        return self.head(self.featured.features(self.network, x_t, t, prompts)[-1])

    def loss(self, draw: Draw, x: Tensor, rng: torch.Generator) -> Tensor:
        """Return the loss of `TrainedCritic.loss` plus the weighted loss of the head on real and drawn images."""
        real, prompts = self.real(len(x), rng)
        on_real = F.softplus(-self.logits(real, prompts, rng)).mean()
        on_drawn = F.softplus(self.logits(x, draw.prompts, rng)).mean()
        return super().loss(draw, x, rng) + self.weight * (on_real + on_drawn)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of `TrainedCritic.state_dict` and of the head."""
        return {**super().state_dict(), "head": self.head.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state)
        self.head.load_state_dict(state["head"])
