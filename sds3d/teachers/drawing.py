"""Sampling images from a teacher with guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sds3d import cameras as cam
from sds3d.cameras import Cameras
from sds3d.diffusion.guidance import cfg
from sds3d.diffusion.noise import Prediction
from sds3d.diffusion.samplers import Sampler
from sds3d.diffusion.samplers.levels import Fresh
from sds3d.diffusion.seeded_noise import ImageNoise, in_order, piece_size, pieces
from sds3d.runtime.torch_modes import require_own_process
from sds3d.runtime.transfer import onto
from sds3d.teachers.base import HasDevice, Teacher, views_per_set


def guided_predictor(
    teacher: Teacher, prompts: Sequence[str], scale: float, cameras: Cameras | None = None
) -> Callable[[Tensor, Tensor], Prediction]:
    """Return a predict function for samplers: the teacher guided by v_uncond + scale (v - v_uncond), for B prompts.

    At scale 1 only the prompts are evaluated. The null prompt gets no camera.
    """
    texts, count = list(prompts), len(prompts)
    if scale == 1:
        return lambda x_t, t: teacher.predict(x_t, t, texts, cameras)
    both = cam.cat([cameras] * 2) if cameras is not None else None
    mask = torch.arange(2 * count) < count if cameras is not None else None

    def predict(x_t: Tensor, t: Tensor) -> Prediction:
        camera_mask = None if mask is None else onto(mask, x_t.device)
        batch = teacher.predict(torch.cat([x_t] * 2), torch.cat([t] * 2), texts + [""] * count, both, camera_mask)
        cond, uncond = batch[:count], batch[count:]
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
    """Return x (B, C, h, w) that the sampler draws from this noise for B prompts.

    Args:
        rng: source of fresh noise, for samplers that add noise.
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
    """Draw one image for each prompt, in pieces of a fixed size: images ``first``, ``first`` + 1, ... of a seed.

    See `sds3d.diffusion.seeded_noise`. Decode a whole piece before you remove its padding: the output of a decoder
    depends on the batch.

    Args:
        cameras: one camera for each prompt, or None.
        device: device of the teacher.

    Yields:
        The indices of the P prompts of a piece, its noise and its x (at least P rows, C, h, w); the first P rows
        belong to these prompts, the rest is padding.

    Raises:
        ValueError: the teacher denoises sets of views, and the cameras are not whole sets; or see
            `sds3d.runtime.torch_modes.require_own_process`.
    """
    require_own_process()
    device, views = torch.device(device), views_per_set(teacher) if cameras is not None else 1
    if len(prompts) % views:
        raise ValueError(f"this teacher sees {views} views of a scene at once and got {len(prompts)}; give a multiple")
    cameras = cameras.to(device) if cameras is not None else None
    sort_by = prompts if views == 1 else [""] * len(prompts)  # equal texts keep the rows of a set together
    for rows, count in pieces(sort_by, piece_size(teacher.image_size, device, views)):
        fresh = ImageNoise(seed, [first + row for row in rows], teacher.shape, device)
        noise, row_cameras = fresh(), cameras[torch.tensor(rows)] if cameras is not None else None
        x = draw(teacher, noise, [prompts[row] for row in rows], sampler, guidance, row_cameras, fresh)
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
    """Draw one image for each prompt, (B, 3, H, W) in [0, 1].

    Image i of a seed depends only on its prompt and camera, not on the other images; see
    `sds3d.diffusion.seeded_noise`.

    Args:
        cameras: B exact cameras, or None to leave the view to the prompts' words.
        sampler: one of `samplers.SAMPLERS`.
        device: device of the teacher; None takes ``teacher.device`` if it has one, else the CPU.
    """
    if not prompts:
        return torch.zeros(0, 3, teacher.image_size, teacher.image_size)
    if device is None:
        device = teacher.device if isinstance(teacher, HasDevice) else "cpu"
    batches = draw_batches(teacher, prompts, seed, Sampler(sampler, steps), guidance, cameras, device=device)
    rows, images = zip(*((rows, teacher.decode(x)[: len(rows)]) for rows, _, x in batches))
    return in_order(sum(rows, []), images)
