"""What a teacher draws by itself: many steps of a sampler, with guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sds3d import cameras as cam
from sds3d.cameras import Cameras
from sds3d.diffusion.draws import ImageNoise, in_order, piece_size, pieces
from sds3d.diffusion.guidance import cfg
from sds3d.diffusion.noise import Prediction
from sds3d.diffusion.samplers import Fresh, Sampler
from sds3d.runtime.modes import require_own_process
from sds3d.runtime.transfer import onto
from sds3d.teachers.base import HasDevice, Teacher, views_per_set


def guided_predictor(
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
    rng: Fresh | None = None,
) -> Tensor:
    """x (B, C, h, w) that the sampler makes of this noise for B prompts.

    Args:
        rng: of fresh noise, for samplers that add some.
    """
    assert noise.shape == (len(prompts), *teacher.shape), (noise.shape, len(prompts), teacher.shape)
    *_, (_, _, x) = sampler(guided_predictor(teacher, prompts, guidance, cameras), noise, teacher.schedule, rng)
    return x


def draw_batches(
    teacher: Teacher,
    prompts: Sequence[str],
    seed: int,
    sampler: Sampler,
    guidance: float,
    cameras: Cameras | None = None,
    first: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """A piece at a time: which of the prompts (P of them), noise and x (P or more, C, h, w) whose first P are theirs;
    of images ``first``, ``first`` + 1, ... of a seed, one a prompt; see `sds3d.diffusion.draws`.

    Decode a whole piece before you cut it: a network that decodes depends on the batch, too.

    Args:
        cameras: as many as prompts, or None.
        device: where the teacher is.

    Raises:
        ValueError: cameras for a teacher that judges several views of a scene at once, and they are no whole sets; or
            see `sds3d.runtime.modes.require_own_process`.
    """
    require_own_process()
    device, views = torch.device(device), views_per_set(teacher) if cameras is not None else 1
    if len(prompts) % views:
        raise ValueError(f"this teacher sees {views} views of a scene at once and got {len(prompts)}; give a multiple")
    cameras = cameras.to(device) if cameras is not None else None
    alike = prompts if views == 1 else [""] * len(prompts)  # sets stay together
    for rows, count in pieces(alike, piece_size(teacher.image_size, device, views)):
        fresh = ImageNoise(seed, [first + row for row in rows], teacher.shape, device)
        noise, seen = fresh(), cameras[torch.tensor(rows)] if cameras is not None else None
        x = draw(teacher, noise, [prompts[row] for row in rows], sampler, guidance, seen, fresh)
        yield rows[:count], noise, x


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

    Image i of a seed depends on its prompt and camera alone, not on how many are drawn; see `sds3d.diffusion.draws`.

    Args:
        cameras: B exact cameras, or None to leave the view to the prompts' words.
        sampler: one of `samplers.SAMPLERS`.
        device: where the teacher is; None asks it.
    """
    if not prompts:
        return torch.zeros(0, 3, teacher.image_size, teacher.image_size)
    own = teacher.device if isinstance(teacher, HasDevice) else "cpu"
    where = torch.device(own if device is None else device)
    made = draw_batches(teacher, prompts, seed, Sampler(sampler, steps), guidance, cameras, device=where)
    rows, images = zip(*((rows, teacher.decode(x)[: len(rows)]) for rows, _, x in made))
    return in_order(sum(rows, []), images)
