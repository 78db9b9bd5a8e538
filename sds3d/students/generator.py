"""A one-step or few-step generator: a diffusion network whose denoised image is the result.

The network starts as a copy of the teacher's. In one step, at the noise level sigma/alpha = sigma_init,
G(z, c) = x0_theta(sigma z, t, c) (Diff-Instruct, arXiv 2305.18455, section 3; DMD, arXiv 2311.18828, section 3.1).
With K steps at falling t_1 > ... > t_K

    x_1 = G(z_1, t_1)        x_k = x0_theta(alpha_k x_{k-1} + sigma_k z_k, t_k, c)

Training draws a step k. The generator makes the input of that step itself, without gradient (backward simulation, DMD2,
arXiv 2405.14867, section 4.5). For a diffusers pipeline G(z, t, c) = x0_theta(z, t, c) instead, at a level on which its
network was trained, since the pipeline's latents start with this noise: x_t is about as large as z at every level.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sds3d.diffusion.noise import Prediction, Schedule, noised
from sds3d.diffusion.seeded_noise import ImageNoise, in_order, piece_size, pieces
from sds3d.networks.ema import EMA
from sds3d.runtime.distributed import Processes
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import Within
from sds3d.runtime.transfer import onto
from sds3d.students.base import Draw
from sds3d.students.optim import OptimConfig


@dataclass(frozen=True)
class GeneratorConfig:
    """Settings of a few-step generator.

    Args:
        sigma_init: noise level sigma/alpha of the first step. 0 chooses 2.5 for images of 8 pixels a side and
            proportionally more for larger ones, since the same noise hides less of a larger image (Hoogeboom et al.,
            arXiv 2301.11093, eq. 4), up to the end of the schedule: Stable Diffusion's 64 x 64 latents start at level
            999 of 1,000. A flow's pipeline always starts at pure noise.
        steps: number of steps of the generator, 1 to 8.
        batch: images a draw.
        half_lives: of the running means of the weights, in images. The first mean is sampled and exported; the
            checkpoint keeps the others beside it. Early in training a mean forgets faster: in a step it keeps at most
            (1 + step) / (10 + step) of its value.
        prompts: a text file of prompts, one a line; "" takes the teacher's training prompts, if it lists them.

    Raises:
        ValueError: a number is out of its range.
    """

    sigma_init: Annotated[float, Within(0.1, 1000, also=0)] = 0
    steps: Annotated[int, Within(1, 8)] = 1
    batch: Annotated[int, Within(1, 65_536)] = 128
    half_lives: tuple[Annotated[int, Within(1, 10**12)], ...] = (20_000, 5_000)
    prompts: str = ""

    def __post_init__(self):
        if self.sigma_init and not 0.1 <= self.sigma_init <= 1000:
            raise ValueError(
                f"generator.sigma_init is {self.sigma_init}; give a noise level from 0.1 to 1000, or 0 to choose one "
                "by the images' size"
            )
        if not 1 <= self.steps <= 8:
            raise ValueError(f"generator.steps is {self.steps}; give 1 to 8")
        if not 1 <= self.batch <= 65_536:
            raise ValueError(f"generator.batch is {self.batch}; give 1 to 65536 images")
        if not self.half_lives or min(self.half_lives) < 1:
            raise ValueError(f"generator.half_lives is {list(self.half_lives)}; give numbers of images, [20000]")


class Network(Protocol):
    """What a generator needs of the teacher from which it starts."""

    schedule: Schedule
    shape: tuple[int, int, int]
    image_size: int

    @property
    def network(self) -> nn.Module:
        """The denoising network."""
        ...

    def nearest_times(self, times: Tensor) -> tuple[Tensor, float]:
        """Return the times (K,) nearest to these at which the network can run, and the scale of the first noise."""
        ...

    def answer(self, network: nn.Module, x_t: Tensor, t: Tensor, prompts: list[str]) -> Prediction:
        """See `sds3d.distill.critics.Trainable.answer`."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """See `sds3d.teachers.base.Teacher.decode`."""
        ...


def times(schedule: Schedule, config: GeneratorConfig, side: int) -> Tensor:
    """Return t_1 > ... > t_K, (K,) float64, evenly spaced from the t of sigma_init down to 0, which is excluded.

    Args:
        side: size of the images in the teacher's space.

    Raises:
        ValueError: the schedule does not reach sigma_init.
    """
    alpha, sigma = schedule.alpha_sigma(torch.ones((), dtype=torch.float64))
    ratio = config.sigma_init or min(2.5 / 8 * side, float(sigma / alpha))
    first = schedule.t_of_ratio(torch.tensor(ratio, dtype=torch.float64))
    return first * (1 - torch.arange(config.steps, dtype=torch.float64) / config.steps)


def generator_times(teacher: Network, config: GeneratorConfig) -> tuple[Tensor, float]:
    """Return the times (K,) float64 of a generator of this teacher, and the standard deviation of its first noise.

    Raises:
        ValueError: the teacher's pipeline cannot start at sigma_init.
    """
    nearest, size = teacher.nearest_times(times(teacher.schedule, config, teacher.shape[-1]))
    alpha, sigma = teacher.schedule.alpha_sigma(nearest[0])
    if config.sigma_init and not 0.9 * config.sigma_init < sigma / alpha < 1.1 * config.sigma_init:
        raise ValueError(
            f"generator.sigma_init is {config.sigma_init}, and the nearest level at which this teacher's pipeline can "
            f"start in {config.steps} step(s) is {sigma / alpha:.3g}; give 0, which chooses the level"
        )
    return nearest, size


def paint(
    teacher: Network,
    network: nn.Module,
    t: Tensor,
    noise: Sequence[Tensor],
    prompts: list[str],
    size: float | None = None,
) -> Tensor:
    """Return x (B, C, h, w) that ``network`` makes of noise, one tensor (B, C, h, w) for each step, at times t (K,).

    If gradients are enabled, they flow through the last step only.

    Args:
        size: standard deviation of the first noise; None is sigma at the first time.
    """
    alpha, sigma = teacher.schedule.alpha_sigma(t)
    if size is not None:
        sigma = torch.cat([torch.full_like(sigma[:1], size), sigma[1:]])
    x = torch.zeros_like(noise[0])
    for i, fresh in enumerate(noise):
        a, s, t_k = (onto(v[i : i + 1].to(fresh.dtype), fresh.device).expand(len(fresh)) for v in (alpha, sigma, t))
        with torch.set_grad_enabled(torch.is_grad_enabled() and i == len(noise) - 1):
            x = teacher.answer(network, noised(x, fresh, a, s), t_k, prompts).x0
    return x


@torch.no_grad()
def images(
    teacher: Network,
    network: nn.Module,
    t: Tensor,
    prompts: Sequence[str],
    seed: int,
    size: float | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Paint one image for each prompt from a seed's noise, a piece at a time (see `sds3d.diffusion.seeded_noise`).

    Yields:
        indices of P prompts, and their images (P, 3, H, W) in [0, 1].

    Args:
        teacher, network, t, size: as for ``paint``.
    """
    like = next(network.parameters())
    for rows, count in pieces(prompts, piece_size(teacher.image_size, like.device)):
        fresh = ImageNoise(seed, rows, teacher.shape, like.device, torch.promote_types(like.dtype, torch.float32))
        x = paint(teacher, network, t, [fresh() for _ in t], [prompts[row] for row in rows], size)
        yield rows[:count], teacher.decode(x)[:count]


class FewStepGenerator:
    """A `sds3d.students.base.Student` that draws images from noise.

    Args:
        teacher: its network is copied at the start, and it encodes the prompts.
        config: steps, batch and running means.
        prompts: each is drawn with the same probability.
        identity: the teacher's name and fingerprint, which a checkpoint stores.
        processes: the process group, if several processes train.

    Attributes:
        OPTIM: the default learning rate.

    Raises:
        ValueError: there is no prompt, or the teacher's schedule does not reach the noise level.
    """

    OPTIM: ClassVar[OptimConfig] = OptimConfig({"generator": Ramp(500, 2e-4, 0, 1000)}, betas=(0.0, 0.999), eps=1e-8)

    def __init__(
        self,
        teacher: Network,
        config: GeneratorConfig,
        prompts: Sequence[str],
        identity: str = "",
        processes: Processes = Processes(),
    ):
        if not prompts:
            raise ValueError("there is no prompt to draw; give generator.prompts=FILE with one a line")
        self.teacher, self.config, self.prompts, self.identity = teacher, config, list(prompts), identity
        self.processes, self.count = processes, processes.local_batch(config.batch)
        self.times, self.size = generator_times(teacher, config)
        self.network = copy.deepcopy(teacher.network).requires_grad_(True).eval()  # eval: no dropout
        if next(self.network.parameters()).dtype in (torch.float16, torch.bfloat16):
            self.network.float()  # half-precision weights would round small updates away
        self.means = [EMA(self.network, 0.5 ** (config.batch / half_life)) for half_life in config.half_lives]
        self.teacher_replaced = False
        for module in (self.network, *(mean.module for mean in self.means)):
            processes.shard(module)

    def draw(self, step: int, rng: torch.Generator) -> Draw:
        """Return a batch of fresh images as x, each in a group of its own."""
        chosen = self.processes.randint(len(self.prompts), self.count, rng).tolist()
        depth = int(torch.randint(self.config.steps, (), generator=rng)) + 1
        noise = self.noise(self.count, depth, rng)
        prompts = [self.prompts[i] for i in chosen]
        x = self.paint(self.network, noise, prompts)
        return Draw(x, prompts, None, torch.arange(self.count), encoded=True, processes=self.processes)

    def paint(self, network: nn.Module, noise: Sequence[Tensor], prompts: list[str]) -> Tensor:
        """Return x (B, C, h, w) that the network, or a running mean of it, makes of noise; see ``paint``."""
        return paint(self.teacher, network, self.times, noise, prompts, self.size)

    def noise(self, count: int, steps: int, rng: torch.Generator) -> list[Tensor]:
        """Return noise for the first ``steps`` steps, (count, C, h, w) each."""
        like = next(self.network.parameters())
        shape = (count, *self.teacher.shape)
        return [onto(self.processes.randn(shape, rng, like.dtype), like.device) for _ in range(steps)]

    def images(self, prompts: Sequence[str], seed: int) -> Tensor:
        """Return images (B, 3, H, W) in [0, 1] from a seed's noise, painted by the first running mean."""
        if not prompts:
            return torch.zeros(0, 3, self.teacher.image_size, self.teacher.image_size)
        rows, parts = zip(*images(self.teacher, self.means[0].module, self.times, prompts, seed, self.size))
        return in_order(sum(rows, []), parts)

    def regularisers(self) -> dict[str, Tensor]:
        """Return no regularisers."""
        return {}

    def param_groups(self) -> dict[str, list[Parameter]]:
        """Return one group, "generator"."""
        return {"generator": list(self.network.parameters())}

    def after_step(self, step: int, rng: torch.Generator) -> None:
        """Update the running means."""
        for mean in self.means:
            mean.update(self.network, step)

    def begin_phase(self) -> None:
        """Copy the first running mean into the teacher, the network and all means; see `sds3d.students.base.Phased`."""
        weights = {name: value.clone() for name, value in self.means[0].module.state_dict().items()}
        for module in (self.teacher.network, self.network, *(mean.module for mean in self.means)):
            module.load_state_dict(weights)
        self.teacher_replaced = True

    def state_dict(self) -> dict[str, Any]:
        """Return the weights, their means, the teacher's identity and the prompts; and, after `begin_phase`, the
        teacher's weights."""
        teacher = {"teacher_network": self.teacher.network.state_dict()} if self.teacher_replaced else {}
        return teacher | {
            "teacher": self.identity,
            "prompts": self.prompts,
            "network": self.network.state_dict(),
            "means": [mean.module.state_dict() for mean in self.means],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state. Raise ValueError if it belongs to another teacher or to other prompts."""
        if state["teacher"] != self.identity:
            raise ValueError(f"it was begun from the teacher {state['teacher']}, and this one is {self.identity}")
        if state["prompts"] != self.prompts:
            raise ValueError("it was begun with other prompts; give the original file of prompts")
        if "teacher_network" in state:
            self.teacher.network.load_state_dict(state["teacher_network"])
            self.teacher_replaced = True
        self.network.load_state_dict(state["network"])
        for mean, values in zip(self.means, state["means"], strict=True):
            mean.module.load_state_dict(values)
