"""Images whose pixels are the parameters: a 2D playground that shows in seconds what a method does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sds3d.media import picture
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import Within
from sds3d.students.base import Draw
from sds3d.students.optim import OptimConfig

PIXELS = 2**26  # the largest number of pixels of all images: 256 images of 512 x 512


@dataclass(frozen=True)
class ImageConfig:
    """Settings of the images.

    Args:
        count: number of images. The teacher judges each one separately; they differ in their start and in their noise.
        size: pixels a side.
        start: a picture file to start from, with which editing methods compare; "" starts from grey.
        noise: standard deviation of the noise added to the start.

    Raises:
        ValueError: a number is out of its range.
    """

    count: Annotated[int, Within(1, 256)] = 4
    size: Annotated[int, Within(4, 1024)] = 64
    start: str = ""
    noise: Annotated[float, Within(0, 1)] = 0.1

    def __post_init__(self):
        if not 1 <= self.count <= 256:
            raise ValueError(f"image.count is {self.count}; give 1 to 256 images")
        if not 4 <= self.size <= 1024:
            raise ValueError(f"image.size is {self.size}; give 4 to 1024 pixels a side")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"image.noise is {self.noise}; give 0 to 1")
        if self.count * self.size**2 > PIXELS:
            raise ValueError(
                f"image.count={self.count} of {self.size} pixels a side are too many; lower image.count or image.size"
            )


class ImageStudent(nn.Module):
    """Pixels as a student.

    Args:
        config: number, size and start of the images.
        prompt: of all images; it may contain view words.
        rng: CPU generator for the noise of the start.
        device: where the pixels live.

    Attributes:
        OPTIM: the default learning rate.

    Raises:
        ValueError: the start is no picture.
    """

    OPTIM: ClassVar[OptimConfig] = OptimConfig({"pixels": Ramp(100, 0.05, 0.005, 200)}, eps=1e-8)

    def __init__(self, config: ImageConfig, prompt: str, rng: torch.Generator, device: torch.device | str = "cpu"):
        super().__init__()
        self.config, self.prompt, self.device = config, prompt, torch.device(device)
        shape = (config.count, 3, config.size, config.size)
        start = torch.full(shape, 0.5) if not config.start else _read(Path(config.start), config.size).expand(shape)
        noise = torch.randn(shape, generator=rng)
        self.pixels = Parameter((start + config.noise * noise).to(self.device))  # (N, 3, H, W), around [0, 1]
        self.start = start.to(self.device) if config.start else None

    def draw(self, step: int, rng: torch.Generator) -> Draw:
        """Return all images, each in a group of its own."""
        count = self.config.count
        group = torch.arange(count)
        return Draw(self.pixels, [self.prompt] * count, None, group, source=self.start)

    def regularisers(self) -> dict[str, Tensor]:
        """Return no regularisers."""
        return {}

    def param_groups(self) -> dict[str, list[Parameter]]:
        """Return one group, "pixels"."""
        return {"pixels": [self.pixels]}

    def after_step(self, step: int, rng: torch.Generator) -> None:
        """Do nothing."""

    def images(self) -> Tensor:
        """Return the images (N, 3, H, W) in [0, 1], without gradient."""
        return self.pixels.detach().clamp(0, 1)


def _read(path: Path, size: int) -> Tensor:
    """Return the central square of a picture as (1, 3, size, size) in [0, 1]."""
    try:
        return picture.read(path.expanduser(), size)[None] / 255
    except ValueError as error:
        raise ValueError(f"image.start {path} is no picture that can be read: {error}") from error
