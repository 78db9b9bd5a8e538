"""What the score side asks of a teacher, whatever network is behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from sds3d.cameras import Cameras
from sds3d.noise import Prediction, Schedule

PACKAGED = ("small", "toybox", "digits")  # "toybox" is another name of "small"
VIEWS = ("camera", "words")  # how a teacher may be told where an image is seen from


@dataclass(frozen=True)
class TeacherConfig:
    """
    Args:
        name: a packaged teacher, or a path to weights of the same kind.
        views: how it learns where an image is seen from: "camera" (exactly) or "words" (front, side, back view).
        dtype: "auto", "float32" or "bfloat16".
        compile: compile its network and replay it as a CUDA graph (torch.compile, which needs a C compiler): slow to
            begin, then faster where a GPU waits for its launches.
    """

    name: str = "small"
    views: str = "camera"
    dtype: str = "auto"
    compile: bool = False

    def __post_init__(self):
        if self.views not in VIEWS:
            raise ValueError(f"teacher.views is {self.views!r}; give {' or '.join(VIEWS)}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"teacher.dtype is {self.dtype!r}; give auto, float32 or bfloat16")


class Teacher(Protocol):
    """A frozen text-conditioned diffusion model that judges images.

    Attributes:
        schedule: its noise levels; every t below is that of this schedule.
        image_size: side of the images it was trained on, pixels.
        shape: (C, h, w) of one x, the space it denoises in.
        views: how it is told where an image is seen from: "camera" (cameras are passed, no view words) or
            "words" (the prompts carry view words, cameras are not passed).
    """

    schedule: Schedule
    image_size: int
    shape: tuple[int, int, int]
    views: str

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1], any size -> x (B, C, h, w), the space it denoises in; differentiable."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> images (B, 3, H, W) in [0, 1]."""
        ...

    def predict(
        self,
        x_t: Tensor,  # (B, C, h, w)
        t: Tensor,  # (B,)
        prompts: list[str],
        cameras: Cameras | None = None,
        camera_mask: Tensor | None = None,  # (B,) bool
    ) -> Prediction:
        """Its answer at (x_t, t), without gradient, dropout off. "" is the null prompt. Where ``camera_mask`` is
        False the camera is dropped; no mask keeps all. Text embeddings are cached by the teacher."""
        ...

    def check(self, prompt: str) -> None:
        """Refuse what this teacher cannot read.

        Raises:
            ValueError: names the words it does not know and the nearest it does.
        """
        ...


def encode_pixels(images: Tensor, image_size: int, channels: int = 3) -> Tensor:
    """images (B, 3, H, W) in [0, 1] -> (B, channels, image_size, image_size) in [-1, 1]: a pixel teacher's ``encode``.

    Shrinks by area, grows bilinearly; one channel is the mean of the three. Differentiable.
    """
    if channels == 1:
        images = images.mean(1, keepdim=True)
    height, width = images.shape[-2:]
    if min(height, width) >= image_size and max(height, width) > image_size:
        images = F.interpolate(images, (image_size, image_size), mode="area")
    elif (height, width) != (image_size, image_size):
        images = F.interpolate(images, (image_size, image_size), mode="bilinear", align_corners=False)
    return 2 * images - 1


def decode_pixels(x: Tensor) -> Tensor:
    """x (B, 1 or 3, H, W) in [-1, 1] -> images (B, 3, H, W) in [0, 1], clamped: a pixel teacher's ``decode``."""
    return ((x + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)
