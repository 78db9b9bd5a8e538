"""The student's own score: a network that follows what the student draws.

VSD, Diff-Instruct and DMD compare the teacher with it. It starts from the teacher's weights, as a LoRA on them or as a
full copy, and is trained with the ordinary denoising loss on the student's own detached images, at all t
(ProlificDreamer, arXiv 2305.16213). Where the teacher is told the view in words only, the critic gets the exact
camera besides, through a small network that starts at zero: so it always starts equal to the teacher.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sds3d.cameras import Cameras
from sds3d.diffusion.noise import Prediction, noised, target
from sds3d.networks.lora import LoRA
from sds3d.networks.unet import CAMERA_FEATURES, camera_features
from sds3d.prompts import with_view
from sds3d.runtime.distributed import Processes
from sds3d.runtime.ranges import Within
from sds3d.runtime.transfer import onto
from sds3d.students.base import Draw
from sds3d.teachers.base import Teacher, views_per_set

CAMERA_WIDTH = 16  # what a camera becomes before it is widened to the network's condition


class Trainable(Teacher, Protocol):
    """A teacher whose network may be copied and trained.

    Attributes:
        network: its own, frozen.
        extra_width: size of an extra condition its network takes; 0 where it takes none.
    """

    @property
    def network(self) -> nn.Module:
        """See above."""
        ...

    @property
    def extra_width(self) -> int:
        """See above."""
        ...

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


@runtime_checkable
class Adaptable(Protocol):
    """A teacher whose kind of network has LoRAs of its own, in a file that others read."""

    def adapter(
        self, rank: int, rng: torch.Generator, targets: tuple[str, ...], dtype: torch.dtype, checkpointing: bool
    ) -> nn.Module:
        """What stands for the network under low-rank changes, which are its parameters; see `CriticConfig`.

        Raises:
            ValueError: a target that is not there.
        """
        ...

    def save_adapter(self, adapter: nn.Module, folder: Path) -> Path | None:
        """Write the changes into a folder, to be loaded elsewhere; None where nobody could."""
        ...


class Featured(Trainable, Protocol):
    """A teacher whose network shows its features.

    Attributes:
        feature_width: channels of the lowest.
    """

    @property
    def feature_width(self) -> int:
        """See above."""
        ...

    def features(self, network: nn.Module, x_t: Tensor, t: Tensor, prompts: list[str]) -> list[Tensor]:
        """Maps (B, width, h, w) of what a network of the same form sees of x_t (B, C, h, w) at t (B,), with gradients,
        lowest resolution last; in float32 or more, whatever precision the network computes in."""
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
        targets: of a diffusers pipeline's LoRA only: names of its layers, or their ends; () is every attention's
            projections, as in ProlificDreamer's own. (Of a packaged teacher every weight that is wide enough.)
        dtype: of a diffusers pipeline's LoRA only, of its changes and Adam's moments, whatever teacher.dtype is.
            bfloat16 is half of little, and loses small steps.
        checkpointing: of diffusers pipelines only: recompute the network's blocks in the critic's backward pass.
    """

    kind: Literal["lora", "copy"] = "lora"
    steps: Annotated[int, Within(1, 1000)] = 1
    lr: Annotated[float, Within(0, 1, above=True)] = 1e-4
    rank: Annotated[int, Within(1, 512)] = 8
    camera_drop: Annotated[float, Within(0, 1)] = 0.1
    betas: Annotated[tuple[float, float], Within(0, 1)] = (0.9, 0.99)
    weight_decay: Annotated[float, Within(0, 1)] = 0.0
    targets: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    checkpointing: bool = False

    def __post_init__(self):
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"critic.steps is {self.steps}; give 1 to 1000 fits a step")
        if not 0 < self.lr < 1:
            raise ValueError(f"critic.lr is {self.lr}; give a learning rate above 0 and below 1 (1e-4)")
        if not 1 <= self.rank <= 512:
            raise ValueError(f"critic.rank is {self.rank}; give 1 to 512 (8)")
        if not 0 <= self.camera_drop <= 1:
            raise ValueError(f"critic.camera_drop is {self.camera_drop}; give a share from 0 to 1")
        if self.kind == "copy" and (self.targets or self.dtype != "float32"):
            raise ValueError("critic.targets and critic.dtype are a LoRA's; leave them out, or give critic.kind=lora")


class Exact:
    """A critic that knows: any teacher's exact answer, never trained. For tests and for known students."""

    steps = 0

    def __init__(self, score: Teacher):
        self.score = score

    def predict(
        self, x_t: Tensor, t: Tensor, prompts: list[str], cameras: Cameras | None, camera_mask: Tensor | None
    ) -> Prediction:
        """See `sds3d.distill.core.Critic.predict`."""
        return self.score.predict(x_t, t, prompts, cameras if self.score.views == "camera" else None, camera_mask)

    def fit(self, draw: Draw, rng: torch.Generator) -> Tensor:
        """Nobody calls it: an exact critic is not trained."""
        raise AssertionError("an exact critic is not trained")

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing."""
        assert not state, state


class TrainedCritic:
    """A critic that is trained.

    Args:
        teacher: whose network it starts from.
        config: how.
        rng: of the initial values of what is new: a LoRA, the camera's network.
        processes: of the batch, where several processes train.
    """

    def __init__(
        self, teacher: Trainable, config: CriticConfig, rng: torch.Generator, processes: Processes = Processes()
    ):
        self.adapted = config.kind == "lora" and isinstance(teacher, Adaptable)
        processes = (
            replace(processes, sharded=False) if self.adapted else processes
        )  # it is small: each process keeps all of it
        self.teacher: Trainable = teacher  # declared: an isinstance above would narrow it
        self.config, self.steps, self.processes = config, config.steps, processes
        self.network = _network(teacher, config, rng)
        # float16 knows nothing below 6e-8, and a mean over so many numbers has gradients that small
        self.coarse = next(teacher.network.parameters()).dtype == torch.float16
        device = next(self.network.parameters()).device
        self.camera: nn.Module | None = None
        if teacher.views == "words" and teacher.extra_width:
            with torch.random.fork_rng(devices=[]):  # modules draw their first weights from the global stream
                torch.manual_seed(rng.initial_seed())
                first, last = nn.Linear(CAMERA_FEATURES, CAMERA_WIDTH), nn.Linear(CAMERA_WIDTH, teacher.extra_width)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.camera = nn.Sequential(first, nn.SiLU(), last).to(device)
        for part in self.parts():
            processes.shard(part)
        self.optimiser = torch.optim.AdamW(
            self.parameters(), config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        processes.shard_states(self.optimiser)

    def parts(self) -> list[nn.Module]:
        """What is trained."""
        return [self.network] if self.camera is None else [self.network, self.camera]

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained."""
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

    def fit(self, draw: Draw, rng: torch.Generator) -> Tensor:
        """One step on a draw's images; returns the loss, ()."""
        with torch.no_grad():
            x = draw.x(self.teacher.encode)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        loss = self.loss(draw, x, rng)
        self.optimiser.zero_grad(set_to_none=True)
        scale = 2.0 ** int(math.log2(x.numel())) if self.coarse else 1.0  # a power of two, so it changes no digit
        (scale * loss).backward()
        for p in self.parameters() if self.coarse else ():
            if p.grad is not None:
                p.grad /= scale
        self.processes.average_gradients(self.parameters())
        self.optimiser.step()
        return loss.detach()

    def loss(self, draw: Draw, x: Tensor, rng: torch.Generator) -> Tensor:
        """The denoising loss on x (B, C, h, w), ().

        t is uniform from 0 to the schedule's noisiest, one an image or set of views; a share of the cameras is dropped.
        """
        t, dropped = onto(self.processes.rand((len(x), 2), rng), x.device).to(x.dtype).unbind(1)
        seen = draw.cameras is not None and self.teacher.views == "camera"
        views = views_per_set(self.teacher) if seen else 1
        t = t * self.teacher.schedule.t_noisiest  # beyond is a level that its network does not know
        t = t[::views].repeat_interleave(views)  # one for the views that are judged in one
        noise = onto(self.processes.randn(x.shape, rng, x.dtype), x.device)
        alpha, sigma = self.teacher.schedule.alpha_sigma(t)
        prompts, mask = draw.prompts, None
        if draw.cameras is not None:
            mask = dropped >= self.config.camera_drop
            prompts = with_view(prompts, draw.cameras) if self.teacher.views == "words" else prompts
        answer = self.predict(noised(x, noise, alpha, sigma), t, prompts, draw.cameras, mask)
        return F.mse_loss(answer.output, target(answer.kind, x, noise, alpha, sigma, answer.rates))

    def save_adapter(self, folder: Path) -> Path | None:
        """Write a diffusers pipeline's LoRA as such pipelines load it; None where it is none."""
        if self.adapted and isinstance(self.teacher, Adaptable):
            return self.teacher.save_adapter(self.network, folder)
        return None

    def state_dict(self) -> dict[str, Any]:
        """The critic's own weights and its optimiser; of a LoRA the changes alone."""
        camera = {} if self.camera is None else self.camera.state_dict()
        return {"network": self.network.state_dict(), "camera": camera, "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.network.load_state_dict(state["network"])
        if self.camera is not None:
            self.camera.load_state_dict(state["camera"])
        self.optimiser.load_state_dict(state["optimiser"])


def _network(teacher: Trainable, config: CriticConfig, rng: torch.Generator) -> nn.Module:
    """What a critic trains: changes of low rank to the teacher's network, or a copy of it.

    Raises:
        ValueError: settings that are for diffusers pipelines, and the teacher is none.
    """
    if not isinstance(teacher, Adaptable) and (config.targets or config.dtype != "float32" or config.checkpointing):
        raise ValueError(
            "critic.targets, critic.dtype and critic.checkpointing are for diffusers pipelines, and the teacher is "
            "none: leave them out"
        )
    frozen = teacher.network.eval()  # dropout stays off, in the copy too: the student's step must not see it
    if config.kind == "lora" and isinstance(teacher, Adaptable):
        dtype = getattr(torch, config.dtype)
        return teacher.adapter(config.rank, rng, config.targets, dtype, config.checkpointing)
    if config.kind == "lora":
        return LoRA(frozen, config.rank, float(config.rank), rng)
    own: Any = copy.deepcopy(frozen).requires_grad_(True)
    if next(own.parameters()).dtype in (torch.float16, torch.bfloat16):
        own.float()  # steps of 1e-4 are lost on weights in half precision
    if config.checkpointing:
        own.enable_gradient_checkpointing()
    return own
