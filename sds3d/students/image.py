"""Images that are their own parameters: the 2D playground, where a method shows what it does in seconds."""

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

PIXELS = 2**26  # of all images, at most: 256 of 512 a side


@dataclass(frozen=True)
class ImageConfig:
    """
    Args:
        count: images, each judged by itself; they differ in their starts and in their noise.
        size: pixels a side.
        start: a picture file to begin from, and what a method that edits compares with; "" begins in grey.
        noise: standard deviation of the noise that is added to the start.

    Raises:
        ValueError: a number that makes no sense.
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
        config: how many, how large, where they start.
        prompt: of all of them; view words may be part of it.
        rng: CPU generator of the starts.
        device: where the pixels live.

    Attributes:
        OPTIM: the usual learning rate.

    Raises:
        ValueError: the start is no picture.
    """

    OPTIM: ClassVar[OptimConfig] = OptimConfig({"pixels": Ramp(100, 0.05, 0.005, 200)}, eps=1e-8)

    def __init__(self, config: ImageConfig, prompt: str, rng: torch.Generator, device: torch.device | str = "cpu"):
        super().__init__()
        self.config, self.prompt, self.device = config, prompt, torch.device(device)
        shape = (config.count, 3, config.size, config.size)
        begun = torch.full(shape, 0.5) if not config.start else _read(Path(config.start), config.size).expand(shape)
        noise = torch.randn(shape, generator=rng)
        self.pixels = Parameter((begun + config.noise * noise).to(self.device))  # (N, 3, H, W), around [0, 1]
        self.start = begun.to(self.device) if config.start else None

    def draw(self, step: int, rng: torch.Generator) -> Draw:
        """All images, each a group of its own."""
        count = self.config.count
        group = torch.arange(count)
        return Draw(self.pixels, [self.prompt] * count, None, group, source=self.start)

    def regularisers(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def param_groups(self) -> dict[str, list[Parameter]]:
        """One group, "pixels"."""
        return {"pixels": [self.pixels]}

    def after_step(self, step: int, rng: torch.Generator) -> None:
        """Nothing."""

    def images(self) -> Tensor:
        """(N, 3, H, W) in [0, 1], no gradient."""
        return self.pixels.detach().clamp(0, 1)


def _read(path: Path, size: int) -> Tensor:
    """A picture as (1, 3, size, size) in [0, 1], its middle square."""
    try:
        return picture.read(path.expanduser(), size)[None] / 255
    except ValueError as error:
        raise ValueError(f"image.start {path} is no picture that can be read: {error}") from error
