"""The student's own score: a network that follows what the student draws.

VSD, Diff-Instruct and DMD compare the teacher with it. It starts from the teacher's weights, as a LoRA on them or as a
full copy, and is trained with the ordinary denoising loss on the student's own detached images, at all t
(ProlificDreamer, arXiv 2305.16213). Where the teacher is told the view in words only, the critic gets the exact
camera besides, through a small network that starts at zero: so it always starts equal to the teacher.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sds3d.cameras import Cameras
from sds3d.networks.lora import LoRA
from sds3d.networks.unet import CAMERA_FEATURES, camera_features
from sds3d.noise import Prediction, noised, target
from sds3d.prompts import with_view
from sds3d.shares import Share
from sds3d.students import Draw
from sds3d.teachers.base import Teacher
from sds3d.transfer import onto

CAMERA_WIDTH = 16  # what a camera becomes before it is widened to the network's condition


class Trainable(Teacher, Protocol):
    """A teacher whose network may be copied and trained.

    Attributes:
        network: its own, frozen.
        extra_width: size of an extra condition its network takes; 0 where it takes none.
    """

    network: nn.Module
    extra_width: int

    def answer(
        self,
        network: nn.Module,
        x_t: Tensor,  # (B, C, h, w)
        t: Tensor,  # (B,)
        prompts: list[str],
        cameras: Cameras | None = None,
        camera_mask: Tensor | None = None,  # (B,) bool
        extra: Tensor | None = None,  # (B, extra_width)
    ) -> Prediction:
        """As ``predict``, by another network of the same form, with gradients."""
        ...


class Featured(Trainable, Protocol):
    """A teacher whose network shows its features.

    Attributes:
        feature_width: channels of the lowest.
    """

    feature_width: int

    def features(self, network: nn.Module, x_t: Tensor, t: Tensor, prompts: list[str]) -> list[Tensor]:
        """Maps (B, width, h, w) of what a network of the same form sees of x_t (B, C, h, w) at t (B,), with gradients,
        lowest resolution last."""
        ...


@dataclass(frozen=True)
class CriticConfig:
    """How the critic learns.

    Args:
        kind: "lora" (changes of low rank to the teacher's weights) or "copy" (all of them, copied).
        steps: fits on fresh draws before each step of the student.
        lr: AdamW's learning rate.
        rank: of the LoRA.
        camera_drop: share of the images whose camera it is not told while it learns.
        betas, weight_decay: AdamW's.
    """

    kind: Literal["lora", "copy"] = "lora"
    steps: int = 1
    lr: float = 1e-4
    rank: int = 8
    camera_drop: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    def __post_init__(self):
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"critic.steps is {self.steps}; give 1 to 1000 fits a step")
        if not 0 < self.lr < 1:
            raise ValueError(f"critic.lr is {self.lr}; give a learning rate above 0 (1e-4)")
        if not 1 <= self.rank <= 512:
            raise ValueError(f"critic.rank is {self.rank}; give 1 to 512 (8)")
        if not 0 <= self.camera_drop <= 1:
            raise ValueError(f"critic.camera_drop is {self.camera_drop}; give a share from 0 to 1")


class Exact:
    """A critic that knows: any teacher's exact answer, never trained. For tests and for known students."""

    steps = 0

    def __init__(self, score: Teacher):
        self.score = score

    def predict(
        self, x_t: Tensor, t: Tensor, prompts: list[str], cameras: Cameras | None, camera_mask: Tensor | None
    ) -> Prediction:
        return self.score.predict(x_t, t, prompts, cameras if self.score.views == "camera" else None, camera_mask)

    def fit(self, draw: Draw, generator: torch.Generator) -> Tensor:
        raise AssertionError("an exact critic is not trained")

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state, state


class Learnt:
    """A critic that is trained.

    Args:
        teacher: whose network it starts from.
        config: how.
        generator: of the LoRA's initial values.
        share: of the batch, where several processes train.
    """

    def __init__(self, teacher: Trainable, config: CriticConfig, generator: torch.Generator, share: Share = Share()):
        self.teacher, self.config, self.steps, self.share = teacher, config, config.steps, share
        frozen = teacher.network.eval()  # dropout stays off, in the copy too: the student's step must not see it
        device = next(frozen.parameters()).device
        if config.kind == "lora":
            self.network: nn.Module = LoRA(frozen, config.rank, float(config.rank), generator)
        else:
            self.network = copy.deepcopy(frozen).requires_grad_(True)
            if next(self.network.parameters()).dtype in (torch.float16, torch.bfloat16):
                self.network.float()  # steps of 1e-4 are lost on weights in half precision
        self.camera: nn.Module | None = None
        if teacher.views == "words" and teacher.extra_width:
            self.camera = nn.Sequential(
                nn.Linear(CAMERA_FEATURES, CAMERA_WIDTH), nn.SiLU(), nn.Linear(CAMERA_WIDTH, teacher.extra_width)
            ).to(device)
            nn.init.zeros_(self.camera[-1].weight)
            nn.init.zeros_(self.camera[-1].bias)
        for part in self.parts():
            share.shard(part)
        self.optimiser = torch.optim.AdamW(
            self.parameters(), config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        share.shard_states(self.optimiser)

    def parts(self) -> list[nn.Module]:
        """What is trained."""
        return [self.network] if self.camera is None else [self.network, self.camera]

    def parameters(self) -> list[nn.Parameter]:
        return [p for part in self.parts() for p in part.parameters()]

    def predict(
        self, x_t: Tensor, t: Tensor, prompts: list[str], cameras: Cameras | None, camera_mask: Tensor | None
    ) -> Prediction:
        """See `sds3d.distill.core.Critic.predict`; with gradients where they are enabled."""
        extra = None
        if self.camera is not None and cameras is not None:
            told = torch.ones(len(x_t), device=x_t.device) if camera_mask is None else camera_mask.float()
            extra = self.camera(camera_features(cameras.to(x_t.device))) * told[:, None]
        if self.teacher.views == "words":
            cameras = camera_mask = None
        return self.teacher.answer(self.network, x_t, t, prompts, cameras, camera_mask, extra)

    def fit(self, draw: Draw, generator: torch.Generator) -> Tensor:
        """One step on a draw's images; returns the loss, ()."""
        with torch.no_grad():
            x = draw.x(self.teacher.encode)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        loss = self.loss(draw, x, generator)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.share.average(self.parameters())
        self.optimiser.step()
        return loss.detach()

    def loss(self, draw: Draw, x: Tensor, generator: torch.Generator) -> Tensor:
        """The denoising loss on x (B, C, h, w), ().

        t is uniform in [0, 1], one an image; a share of the cameras is dropped.
        """
        t, dropped = onto(self.share.rand((len(x), 2), generator), x.device).to(x.dtype).unbind(1)
        noise = onto(self.share.randn(x.shape, generator, x.dtype), x.device)
        alpha, sigma = self.teacher.schedule.alpha_sigma(t)
        prompts, mask = draw.prompts, None
        if draw.cameras is not None:
            mask = dropped >= self.config.camera_drop
            prompts = with_view(prompts, draw.cameras) if self.teacher.views == "words" else prompts
        answer = self.predict(noised(x, noise, alpha, sigma), t, prompts, draw.cameras, mask)
        return F.mse_loss(answer.output, target(answer.kind, x, noise, alpha, sigma, answer.rates))

    def state_dict(self) -> dict[str, Any]:
        """The critic's own weights and its optimiser; of a LoRA the changes alone."""
        camera = {} if self.camera is None else self.camera.state_dict()
        return {"network": self.network.state_dict(), "camera": camera, "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        if self.camera is not None:
            self.camera.load_state_dict(state["camera"])
        self.optimiser.load_state_dict(state["optimiser"])
