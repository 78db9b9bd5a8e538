"""A generator that paints in one step, or in a few: a diffusion network whose denoised image is taken as drawn.

G(z, c) = x0_theta(sigma z, t, c) at the noise level sigma/alpha = sigma_init, from the teacher's own weights on (Diff-
Instruct, arXiv 2305.18455, section 3; DMD, arXiv 2311.18828, section 3.1). With K steps at falling t_1 > ... > t_K

    x_1 = G(z_1, t_1)        x_k = x0_theta(alpha_k x_{k-1} + sigma_k z_k, t_k, c)

and in training a step k is drawn, whose input the generator makes itself, without gradient (backward simulation, DMD2,
arXiv 2405.14867, section 4.5). From a diffusers pipeline G(z, t, c) = x0_theta(z, t, c) instead, at a level that its
network was trained on, as the pipeline's own latents begin; x_t is about as large as z at every level.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sds3d.diffusion.draws import ImageNoise, in_order, piece_size, pieces
from sds3d.diffusion.noise import Prediction, Schedule, noised
from sds3d.networks.ema import EMA
from sds3d.runtime.distributed import Processes
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import Within
from sds3d.runtime.transfer import onto
from sds3d.students.base import Draw
from sds3d.students.optim import OptimConfig


@dataclass(frozen=True)
class GeneratorConfig:
    """
    Args:
        sigma_init: sigma/alpha that the network is told with pure noise; 0 is 2.5 for 8 pixels a side and as much more
            as there are more: the same noise hides less of a larger image (Hoogeboom et al., arXiv 2301.11093, eq. 4).
            Where the schedule ends before, its end: Stable Diffusion's 64 x 64 latents begin at 999 of 1,000. A flow's
            pipeline begins at pure noise, and has no choice.
        steps: of the generator, 1 to 8.
        batch: images a draw.
        half_lives: of running means of its weights, in images; the first is what is sampled and exported, the others
            are kept beside it in the checkpoint. A young mean forgets faster: it never keeps more than
            (1 + step) / (10 + step) of itself in a step.
        prompts: a text file of prompts, one a line; "" is what the teacher was trained on, where it says that.

    Raises:
        ValueError: a number that makes no sense.
    """

    sigma_init: Annotated[float, Within(0.1, 1000, also=0)] = 0
    steps: Annotated[int, Within(1, 8)] = 1
    batch: Annotated[int, Within(1, 65_536)] = 128
    half_lives: tuple[Annotated[int, Within(1, 10**12)], ...] = (20_000, 5_000)
    prompts: str = ""

    def __post_init__(self):
        if self.sigma_init and not 0.1 <= self.sigma_init <= 1000:
            raise ValueError(
                f"generator.sigma_init is {self.sigma_init}; give a noise level from 0.1 to 1000, or 0 for one that "
                "fits the images"
            )
        if not 1 <= self.steps <= 8:
            raise ValueError(f"generator.steps is {self.steps}; give 1 to 8")
        if not 1 <= self.batch <= 65_536:
            raise ValueError(f"generator.batch is {self.batch}; give 1 to 65536 images")
        if not self.half_lives or min(self.half_lives) < 1:
            raise ValueError(f"generator.half_lives is {list(self.half_lives)}; give numbers of images, [20000]")


class Network(Protocol):
    """What a generator asks of the teacher it starts from."""

    schedule: Schedule
    shape: tuple[int, int, int]
    image_size: int

    @property
    def network(self) -> nn.Module:
        """See above."""
        ...

    def nearest_timesteps(self, times: Tensor) -> tuple[Tensor, float]:
        """The times (K,) nearest to these at which a generator can be asked, and how large its first noise is."""
        ...

    def answer(self, network: nn.Module, x_t: Tensor, t: Tensor, prompts: list[str]) -> Prediction:
        """See `sds3d.distill.critics.Trainable.answer`."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """See `sds3d.teachers.base.Teacher.decode`."""
        ...


def times(schedule: Schedule, config: GeneratorConfig, side: int) -> Tensor:
    """t_1 > ... > t_K, (K,) float64, evenly spaced from the t of sigma_init to 0, which is left out.

    Args:
        side: of the images, in the teacher's space.

    Raises:
        ValueError: the schedule never gets to the sigma_init that was given.
    """
    alpha, sigma = schedule.alpha_sigma(torch.ones((), dtype=torch.float64))
    ratio = config.sigma_init or min(2.5 / 8 * side, float(sigma / alpha))
    first = schedule.t_of_ratio(torch.tensor(ratio, dtype=torch.float64))
    return first * (1 - torch.arange(config.steps, dtype=torch.float64) / config.steps)


def begun_at(teacher: Network, config: GeneratorConfig) -> tuple[Tensor, float]:
    """The times (K,) float64 of a generator that starts from this teacher, and the size of its first noise.

    Raises:
        ValueError: the teacher cannot begin at the sigma_init that was given.
    """
    found, size = teacher.nearest_timesteps(times(teacher.schedule, config, teacher.shape[-1]))
    alpha, sigma = teacher.schedule.alpha_sigma(found[0])
    if config.sigma_init and not 0.9 * config.sigma_init < sigma / alpha < 1.1 * config.sigma_init:
        raise ValueError(
            f"generator.sigma_init is {config.sigma_init}, and the nearest that this teacher's pipeline begins at in "
            f"{config.steps} step(s) is {sigma / alpha:.3g}; give 0, which chooses"
        )
    return found, size


def paint(
    teacher: Network,
    network: nn.Module,
    t: Tensor,
    noise: Sequence[Tensor],
    prompts: list[str],
    size: float | None = None,
) -> Tensor:
    """x (B, C, h, w) that ``network`` makes of noise, a tensor (B, C, h, w) for each step, at the times t (K,).

    Gradients, where they are enabled, go through the last step alone.

    Args:
        size: standard deviation of the noise it begins with; None is sigma at the first time.
    """
    alpha, sigma = teacher.schedule.alpha_sigma(t)
    if size is not None:
        sigma = torch.cat([torch.full_like(sigma[:1], size), sigma[1:]])
    x = torch.zeros_like(noise[0])
    for i, fresh in enumerate(noise):
        a, s, when = (onto(v[i : i + 1].to(fresh.dtype), fresh.device).expand(len(fresh)) for v in (alpha, sigma, t))
        with torch.set_grad_enabled(torch.is_grad_enabled() and i == len(noise) - 1):
            x = teacher.answer(network, noised(x, fresh, a, s), when, prompts).x0
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
    """Which of the prompts (P of them), and the images (P, 3, H, W) in [0, 1] that ``network`` makes of a seed's noise
    for them, a piece at a time; see `sds3d.diffusion.draws`. Arguments as ``paint``'s."""
    like = next(network.parameters())
    for rows, count in pieces(prompts, piece_size(teacher.image_size, like.device)):
        fresh = ImageNoise(seed, rows, teacher.shape, like.device, torch.promote_types(like.dtype, torch.float32))
        x = paint(teacher, network, t, [fresh() for _ in t], [prompts[row] for row in rows], size)
        yield rows[:count], teacher.decode(x)[:count]


class FewStepGenerator:
    """A `sds3d.students.base.Student` that draws images from noise.

    Args:
        teacher: whose network it starts from, and which reads the prompts.
        config: how.
        prompts: what to draw, each as often as the others.
        identity: the teacher's name and fingerprint, which a checkpoint remembers.
        processes: of the batch, where several processes train.

    Attributes:
        OPTIM: the usual learning rate.

    Raises:
        ValueError: no prompt, or a noise level that the teacher's schedule does not reach.
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
        self.processes, self.count = processes, processes.of(config.batch)
        self.times, self.size = begun_at(teacher, config)
        self.network = copy.deepcopy(teacher.network).requires_grad_(True).eval()  # dropout stays off
        if next(self.network.parameters()).dtype in (torch.float16, torch.bfloat16):
            self.network.float()  # small steps are lost on weights in half precision
        self.means = [EMA(self.network, 0.5 ** (config.batch / half_life)) for half_life in config.half_lives]
        self.taught_itself = False
        for module in (self.network, *(mean.module for mean in self.means)):
            processes.shard(module)

    def draw(self, step: int, rng: torch.Generator) -> Draw:
        """A batch of fresh images as x, each a group of its own."""
        chosen = self.processes.randint(len(self.prompts), self.count, rng).tolist()
        depth = int(torch.randint(self.config.steps, (), generator=rng)) + 1
        noise = self.noise(self.count, depth, rng)
        prompts = [self.prompts[i] for i in chosen]
        x = self.paint(self.network, noise, prompts)
        return Draw(x, prompts, None, torch.arange(self.count), encoded=True, processes=self.processes)

    def paint(self, network: nn.Module, noise: Sequence[Tensor], prompts: list[str]) -> Tensor:
        """x (B, C, h, w) that the network, or a mean of it, makes of noise for the first steps; see ``paint``."""
        return paint(self.teacher, network, self.times, noise, prompts, self.size)

    def noise(self, count: int, steps: int, rng: torch.Generator) -> list[Tensor]:
        """Noise for so many steps, (count, C, h, w) each."""
        like = next(self.network.parameters())
        shape = (count, *self.teacher.shape)
        return [onto(self.processes.randn(shape, rng, like.dtype), like.device) for _ in range(steps)]

    def images(self, prompts: Sequence[str], seed: int) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of a seed by the first running mean's weights."""
        if not prompts:
            return torch.zeros(0, 3, self.teacher.image_size, self.teacher.image_size)
        made = images(self.teacher, self.means[0].module, self.times, prompts, seed, self.size)
        rows, found = zip(*made)
        return in_order(sum(rows, []), found)

    def regularisers(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def param_groups(self) -> dict[str, list[Parameter]]:
        """One group, "generator"."""
        return {"generator": list(self.network.parameters())}

    def after_step(self, step: int, rng: torch.Generator) -> None:
        """Bring the running means up to date."""
        for mean in self.means:
            mean.update(self.network, step)

    def begin_phase(self) -> None:
        """See `sds3d.students.base.Phased`: the first running mean. The teacher's own weights are written over."""
        weights = {name: value.clone() for name, value in self.means[0].module.state_dict().items()}
        for module in (self.teacher.network, self.network, *(mean.module for mean in self.means)):
            module.load_state_dict(weights)
        self.taught_itself = True

    def state_dict(self) -> dict[str, Any]:
        """The weights, their means, and whose they were at the start; the teacher's, where it is no longer that one."""
        own = {"teacher_network": self.teacher.network.state_dict()} if self.taught_itself else {}
        return own | {
            "teacher": self.identity,
            "prompts": self.prompts,
            "network": self.network.state_dict(),
            "means": [mean.module.state_dict() for mean in self.means],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the checkpoint is of another teacher's student, or of other prompts."""
        if state["teacher"] != self.identity:
            raise ValueError(f"it was begun from the teacher {state['teacher']}, and this one is {self.identity}")
        if state["prompts"] != self.prompts:
            raise ValueError("it was learning other prompts; give the file of prompts as it was")
        if "teacher_network" in state:
            self.teacher.network.load_state_dict(state["teacher_network"])
            self.taught_itself = True
        self.network.load_state_dict(state["network"])
        for mean, values in zip(self.means, state["means"], strict=True):
            mean.module.load_state_dict(values)
