"""The critic: a network that learns the score of the student's images.

VSD, Diff-Instruct and DMD compare the teacher with it. It starts from the teacher's weights, as a LoRA on them or as a
full copy, and is trained with the denoising loss on the student's detached images at all t (ProlificDreamer, arXiv
2305.16213). If the teacher gets the view only in words, the critic gets the exact camera as well, through a small
network whose output is zero at first. The critic therefore starts equal to its teacher. Where a scene shows normals or
depths, this is the teacher that answers for them: it knows colours, too, if not quite as the one that is asked.
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
from sds3d.domains import with_domain
from sds3d.networks.lora import LoRA
from sds3d.networks.unet import CAMERA_FEATURES, camera_features
from sds3d.prompts import with_view
from sds3d.runtime.distributed import Processes
from sds3d.runtime.ranges import Within
from sds3d.runtime.transfer import onto
from sds3d.students.base import Draw
from sds3d.teachers.base import Teacher, views_per_set

CAMERA_WIDTH = 16  # hidden width of the small network that embeds a camera


@runtime_checkable
class Trainable(Teacher, Protocol):
    """A teacher whose network may be copied and trained.

    Attributes:
        network: the teacher's network, frozen.
        extra_width: size of an extra condition that the network takes; 0 if it takes none.
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
        """As ``predict``, with another network of the same form, and with gradients."""
        ...


@runtime_checkable
class Adaptable(Protocol):
    """A teacher with a LoRA of its own kind, which it can save in a standard file format."""

    def adapter(
        self, rank: int, rng: torch.Generator, targets: tuple[str, ...], dtype: torch.dtype, checkpointing: bool
    ) -> nn.Module:
        """Return the network with low-rank changes. Its parameters are the changes alone; see `CriticConfig`.

        Raises:
            ValueError: a target matches no layer.
        """
        ...

    def save_adapter(self, adapter: nn.Module, folder: Path) -> Path | None:
        """Write the changes into a folder and return the file; None if no such file format exists."""
        ...


class Featured(Trainable, Protocol):
    """A teacher that returns the feature maps of its network.

    Attributes:
        feature_width: channels of the maps at the lowest resolution.
    """

    @property
    def feature_width(self) -> int:
        """See above."""
        ...

    def features(self, network: nn.Module, x_t: Tensor, t: Tensor, prompts: list[str]) -> list[Tensor]:
        """Return feature maps (B, width, h, w) of a network of the same form for x_t (B, C, h, w) at t (B,).

        With gradients, lowest resolution last, at least in float32 whatever dtype the network computes in.
        """
        ...


@dataclass(frozen=True)
class CriticConfig:
    """How the critic is built and trained.

    Args:
        kind: "lora" (low-rank changes to the teacher's weights) or "copy" (a copy of all weights).
        steps: critic steps on fresh draws before each step of the student.
        lr: learning rate of AdamW.
        rank: rank of the LoRA.
        camera_drop: fraction of the images whose camera is dropped in training.
        betas, weight_decay: of AdamW.
        targets: for the LoRA of a diffusers pipeline only: names of layers, or the ends of names. () is the projections
            of every attention, as in ProlificDreamer. (A packaged teacher's LoRA changes every weight that is wider
            than the rank.)
        dtype: for the LoRA of a diffusers pipeline only: dtype of the changes and of Adam's moments, whatever
            teacher.dtype is. bfloat16 saves little memory and loses small steps.
        checkpointing: for diffusers pipelines only: recompute the network's blocks in the critic's backward pass.
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
            raise ValueError(f"critic.steps is {self.steps}; give 1 to 1000 critic steps for each step")
        if not 0 < self.lr < 1:
            raise ValueError(f"critic.lr is {self.lr}; give a learning rate above 0 and below 1 (1e-4)")
        if not 1 <= self.rank <= 512:
            raise ValueError(f"critic.rank is {self.rank}; give 1 to 512 (8)")
        if not 0 <= self.camera_drop <= 1:
            raise ValueError(f"critic.camera_drop is {self.camera_drop}; give a fraction from 0 to 1")
        if self.kind == "copy" and (self.targets or self.dtype != "float32"):
            raise ValueError("critic.targets and critic.dtype are for a LoRA; leave them out, or give critic.kind=lora")


class ExactCritic:
    """A critic that answers with a given teacher and is never trained. For tests and for students of known density."""

    steps = 0

    def __init__(self, score: Teacher):
        self.score = score

    def predict(
        self, x_t: Tensor, t: Tensor, prompts: list[str], cameras: Cameras | None, camera_mask: Tensor | None
    ) -> Prediction:
        """See `sds3d.distill.query.Critic.predict`."""
        return self.score.predict(x_t, t, prompts, cameras if self.score.views == "camera" else None, camera_mask)

    def fit(self, draw: Draw, rng: torch.Generator) -> Tensor:
        """Never called, as ``steps`` is 0."""
        raise AssertionError("an exact critic is not trained")

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accept an empty state."""
        assert not state, state


class TrainedCritic:
    """A critic that is trained.

    Args:
        teacher: teacher whose network the critic starts from.
        config: settings.
        rng: generator of the initial values of the LoRA and of the camera's network.
        processes: the processes that share a batch.
    """

    def __init__(
        self, teacher: Trainable, config: CriticConfig, rng: torch.Generator, processes: Processes = Processes()
    ):
        self.adapted = config.kind == "lora" and isinstance(teacher, Adaptable)
        if self.adapted:  # an adapter is small, so each process keeps all of it
            processes = replace(processes, sharded=False)
        self.teacher: Trainable = teacher  # annotated, since the isinstance above would narrow the type
        self.config, self.steps, self.processes = config, config.steps, processes
        self.network = _network(teacher, config, rng)
        # float16 has no numbers below 6e-8, and the gradients of a mean over so many values can be that small
        self.scale_loss = next(teacher.network.parameters()).dtype == torch.float16
        device = next(self.network.parameters()).device
        self.camera: nn.Module | None = None
        if teacher.views == "words" and teacher.extra_width:
            with torch.random.fork_rng(devices=[]):  # modules draw their initial weights from the global stream
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
        """Return the trained modules."""
        return [self.network] if self.camera is None else [self.network, self.camera]

    def parameters(self) -> list[nn.Parameter]:
        """Return all trained parameters."""
        return [p for part in self.parts() for p in part.parameters()]

    def predict(
        self, x_t: Tensor, t: Tensor, prompts: list[str], cameras: Cameras | None, camera_mask: Tensor | None
    ) -> Prediction:
        """See `sds3d.distill.query.Critic.predict`; with gradients if they are enabled."""
        extra = None
        if self.camera is not None and cameras is not None:
            mask = torch.ones(len(x_t), device=x_t.device) if camera_mask is None else camera_mask.float()
            extra = self.camera(camera_features(cameras.to(x_t.device))) * mask[:, None]
        if self.teacher.views == "words":
            cameras = camera_mask = None
        return self.teacher.answer(self.network, x_t, t, prompts, cameras, camera_mask, extra)

    def fit(self, draw: Draw, rng: torch.Generator) -> Tensor:
        """Take one optimiser step on a draw's images and return the loss, ()."""
        with torch.no_grad():
            x = draw.x(self.teacher.encode)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        loss = self.loss(draw, x, rng)
        self.optimiser.zero_grad(set_to_none=True)
        scale = 2.0 ** int(math.log2(x.numel())) if self.scale_loss else 1.0  # a power of two, so scaling is exact
        (scale * loss).backward()
        for p in self.parameters() if self.scale_loss else ():
            if p.grad is not None:
                p.grad /= scale
        self.processes.average_gradients(self.parameters())
        self.optimiser.step()
        return loss.detach()

    def loss(self, draw: Draw, x: Tensor, rng: torch.Generator) -> Tensor:
        """Return the denoising loss on x (B, C, h, w), ().

        t is uniform from 0 to the schedule's noisiest level, one for each image or set of views. A fraction
        ``camera_drop`` of the cameras is dropped.
        """
        t, dropped = onto(self.processes.rand((len(x), 2), rng), x.device).to(x.dtype).unbind(1)
        takes_camera = draw.cameras is not None and self.teacher.views == "camera"
        views = views_per_set(self.teacher) if takes_camera else 1
        t = t * self.teacher.schedule.t_noisiest  # the network is not trained beyond this level
        t = t[::views].repeat_interleave(views)  # one t for all views of a set
        noise = onto(self.processes.randn(x.shape, rng, x.dtype), x.device)
        alpha, sigma = self.teacher.schedule.alpha_sigma(t)
        prompts, mask = draw.prompts, None
        if draw.cameras is not None:
            mask = dropped >= self.config.camera_drop
            prompts = with_view(prompts, draw.cameras) if self.teacher.views == "words" else prompts
        prompts = with_domain(prompts, draw.domain)
        prediction = self.predict(noised(x, noise, alpha, sigma), t, prompts, draw.cameras, mask)
        return F.mse_loss(prediction.output, target(prediction.kind, x, noise, alpha, sigma, prediction.rates))

    def save_adapter(self, folder: Path) -> Path | None:
        """Write the LoRA of a diffusers pipeline in the format such pipelines load; None for any other critic."""
        if self.adapted and isinstance(self.teacher, Adaptable):
            return self.teacher.save_adapter(self.network, folder)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the trained weights and the state of the optimiser; of a LoRA the changes alone."""
        camera = {} if self.camera is None else self.camera.state_dict()
        return {"network": self.network.state_dict(), "camera": camera, "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.network.load_state_dict(state["network"])
        if self.camera is not None:
            self.camera.load_state_dict(state["camera"])
        self.optimiser.load_state_dict(state["optimiser"])


def _network(teacher: Trainable, config: CriticConfig, rng: torch.Generator) -> nn.Module:
    """Return the network that a critic trains: the teacher's with low-rank changes, or a copy of it.

    Raises:
        ValueError: settings for diffusers pipelines are given, and the teacher is none.
    """
    if not isinstance(teacher, Adaptable) and (config.targets or config.dtype != "float32" or config.checkpointing):
        raise ValueError(
            "critic.targets, critic.dtype and critic.checkpointing are for diffusers pipelines, and the teacher is "
            "none; leave them out"
        )
    frozen = teacher.network.eval()  # dropout stays off in a copy too: the student's step must not have it
    if config.kind == "lora" and isinstance(teacher, Adaptable):
        dtype = getattr(torch, config.dtype)
        return teacher.adapter(config.rank, rng, config.targets, dtype, config.checkpointing)
    if config.kind == "lora":
        return LoRA(frozen, config.rank, float(config.rank), rng)
    trained: Any = copy.deepcopy(frozen).requires_grad_(True)
    if next(trained.parameters()).dtype in (torch.float16, torch.bfloat16):
        trained.float()  # steps of 1e-4 are lost on weights in half precision
    if config.checkpointing:
        trained.enable_gradient_checkpointing()
    return trained
