"""A critic that also tells what the student draws from real images (DMD2, arXiv 2405.14867, section 4.3).

Both are noised to the same kind of levels; the verdict is a small head on the critic network's lowest features, and
the two learn together: the denoising loss and

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

RealSampler = Callable[[int, torch.Generator], tuple[Tensor, list[str]]]  # so many -> x (B, C, h, w) and their prompts


class TrainedDiscriminator(TrainedCritic):
    """See the module.

    Args:
        teacher, config, rng, processes: as ``TrainedCritic``'s.
        real: draws real images.
        weight: of the discriminator's loss beside the denoising loss.
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
        self.real, self.weight, self.shown = real, weight, teacher
        like = next(teacher.network.parameters())
        dtype = torch.promote_types(like.dtype, torch.float32)  # small steps are lost on weights in half precision
        with torch.random.fork_rng(devices=[]):  # modules draw their first weights from the global stream
            torch.manual_seed(rng.initial_seed())
            self.head = DiscriminatorHead(teacher.feature_width).to(like.device, dtype)
        super().__init__(teacher, config, rng, processes)

    def parts(self) -> list[nn.Module]:
        """See `TrainedCritic.parts`; and the head."""
        return [*super().parts(), self.head]

    def verdict(self, x: Tensor, prompts: list[str], rng: torch.Generator) -> Tensor:
        """How real clean x (B, C, h, w) look once noised to any t that the network knows, (B,); differentiable in x."""
        t = onto(self.processes.rand((len(x),), rng), x.device).to(x.dtype) * self.teacher.schedule.t_noisiest
        noise = onto(self.processes.randn(x.shape, rng, x.dtype), x.device)
        x_t = noised(x, noise, *self.teacher.schedule.alpha_sigma(t))
        return self.head(self.shown.features(self.network, x_t, t, prompts)[-1])

    def loss(self, draw: Draw, x: Tensor, rng: torch.Generator) -> Tensor:
        """See `TrainedCritic.loss`; and the head's, on real and drawn images."""
        real, prompts = self.real(len(x), rng)
        told = F.softplus(-self.verdict(real, prompts, rng)).mean()
        missed = F.softplus(self.verdict(x, draw.prompts, rng)).mean()
        return super().loss(draw, x, rng) + self.weight * (told + missed)

    def state_dict(self) -> dict[str, Any]:
        """See `TrainedCritic.state_dict`; and the head's."""
        return {**super().state_dict(), "head": self.head.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        super().load_state_dict(state)
        self.head.load_state_dict(state["head"])
