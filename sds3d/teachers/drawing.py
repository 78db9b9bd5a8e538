"""What a teacher draws by itself: many steps of a sampler, with guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sds3d import cameras as cam
from sds3d.cameras import Cameras
from sds3d.guidance import cfg
from sds3d.noise import Prediction
from sds3d.samplers import Sampler
from sds3d.teachers.base import Teacher
from sds3d.transfer import onto


def guided(
    teacher: Teacher, prompts: Sequence[str], scale: float, cameras: Cameras | None = None
) -> Callable[[Tensor, Tensor], Prediction]:
    """The teacher's answers to B prompts as a sampler asks for them, guided by v_uncond + scale (v - v_uncond).

    At scale 1 only the prompts are asked. The null prompt is told no camera.
    """
    told, count = list(prompts), len(prompts)
    if scale == 1:
        return lambda x_t, t: teacher.predict(x_t, t, told, cameras)
    both = cam.cat([cameras] * 2) if cameras is not None else None
    mask = torch.arange(2 * count) < count if cameras is not None else None

    def predict(x_t: Tensor, t: Tensor) -> Prediction:
        seen = None if mask is None else onto(mask, x_t.device)
        answer = teacher.predict(torch.cat([x_t] * 2), torch.cat([t] * 2), told + [""] * count, both, seen)
        cond, uncond = answer[:count], answer[count:]
        return Prediction(cfg(uncond.v, cond.v, scale), x_t, cond.alpha, cond.sigma, "v")

    return predict


def draw(
    teacher: Teacher,
    noise: Tensor,  # (B, C, h, w), of standard deviation 1
    prompts: Sequence[str],
    sampler: Sampler = Sampler(),
    guidance: float = 1.0,
    cameras: Cameras | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x (B, C, h, w) that the sampler makes of this noise for B prompts.

    Args:
        generator: of fresh noise, for samplers that add some.
    """
    assert noise.shape == (len(prompts), *teacher.shape), (noise.shape, len(prompts), teacher.shape)
    *_, (_, _, x) = sampler(guided(teacher, prompts, guidance, cameras), noise, teacher.schedule, generator)
    return x


def sample(
    teacher: Teacher,
    prompts: Sequence[str],
    seed: int = 0,
    guidance: float = 2.0,
    cameras: Cameras | None = None,
    steps: int = 30,
    sampler: str = "ddim",
    device: torch.device | str | None = None,
) -> Tensor:
    """Images the teacher draws, one a prompt, (B, 3, H, W) in [0, 1].

    Args:
        cameras: B exact cameras, or None to leave the view to the prompts' words.
        sampler: one of `samplers.SAMPLERS`.
        device: where the teacher is; None asks it.
    """
    where = torch.device(device if device is not None else getattr(teacher, "device", "cpu"))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((len(prompts), *teacher.shape), generator=generator).to(where)
    told = cameras.to(where) if cameras is not None else None
    return teacher.decode(draw(teacher, noise, prompts, Sampler(sampler, steps), guidance, told, generator))
