"""A teacher that knows the true answer: the toybox's own images in the place of a network's predictions.

With it a run shows what its scene, recipe and export can reach; what a trained teacher's run lacks beyond that is the
teacher's part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sds3d import domains
from sds3d.cameras import Cameras
from sds3d.data import toybox
from sds3d.diffusion.noise import Prediction, Schedule
from sds3d.teachers.base import decode_pixels, encode_pixels


class TrueTeacher:
    """A `sds3d.teachers.base.Teacher` whose denoised images are the true views of the prompt's toy.

    Args:
        size: side of the images in pixels.

    Examples:
        >>> import sds3d
        >>> asset = sds3d.generate("a red ball", teacher=TrueTeacher(16), steps=2, render={"resolution": 16})
    """

    schedule = Schedule.cosine()
    views, dtype = "camera", torch.float32
    domains = tuple(domains.WORDS)

    def __init__(self, size: int = 64):
        self.image_size, self.shape = size, (3, size, size)

    def encode(self, images: Tensor) -> Tensor:
        """See `sds3d.teachers.base.Teacher.encode`."""
        return encode_pixels(images, self.image_size)

    def decode(self, x: Tensor) -> Tensor:
        """See `sds3d.teachers.base.Teacher.decode`."""
        return decode_pixels(x)

    def check(self, prompt: str) -> None:
        """Raise ValueError if the toybox cannot draw the prompt."""
        toybox.parse(prompt)

    def predict(
        self,
        x_t: Tensor,
        t: Tensor,
        prompts: list[str],
        cameras: Cameras | None = None,
        camera_mask: Tensor | None = None,
    ) -> Prediction:
        """Return the true images for prompts with cameras. A null prompt gets the true image of the same row of the
        prompts that are not null, so that guidance changes nothing.

        Raises:
            ValueError: there are no cameras.
        """
        if cameras is None:
            raise ValueError("the true teacher needs cameras; set teacher.views=camera")
        named = [prompt for prompt in prompts if domains.split_domain(prompt)[0]]
        truth = torch.empty(len(named), 3, self.image_size, self.image_size)
        for prompt in dict.fromkeys(named):
            rows = torch.tensor([i for i, other in enumerate(named) if other == prompt])
            truth[rows] = self._images(prompt, cameras[rows])
        truth = encode_pixels(truth, self.image_size).repeat(len(prompts) // len(named), 1, 1, 1)
        alpha, sigma = self.schedule.alpha_sigma(t)
        return Prediction(truth.to(x_t), x_t, alpha, sigma, "x0")

    def _images(self, prompt: str, cameras: Cameras) -> Tensor:
        """Return the true images (B, 3, H, W) of a prompt that may end with the word of a domain."""
        text, domain = domains.split_domain(prompt)
        return toybox.parse(text).render(cameras.to("cpu"), self.image_size, domain=domain)[0]
