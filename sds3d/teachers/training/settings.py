"""The settings of a teacher's training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sds3d.runtime.ranges import STEPS, Within
from sds3d.runtime.validation import check

DIGITS_STEPS = 5000  # of the packaged digits teacher; more steps do not lower the loss on held-out images


@dataclass(frozen=True)
class FitConfig:
    """How to train.

    Args:
        data: "toybox", "digits", or a folder of pictures with captions.
        size: side in pixels of a folder's pictures, 32 or 64.
        steps: total number of steps; may be changed on resuming.
        batch: images in a step; a coarse step takes twice as many.
        coarse: number of first steps with images of half the side, which halves the time of a step. The meaning of
            words and cameras is learnt in these steps, detail afterwards. If there are any, every second of the later
            steps is coarse, too, so that the teacher keeps denoising both sizes. 0 trains on the whole size only.
        part: in the coarse steps of the toybox, extra weight of pixels that show the second colour. Handles and stems
            are small, and their colours are learnt last.
        start: weights to begin from: a packaged teacher's name or a file; "" begins at random. Words that they do not
            know begin at random.
        colours: fraction of the toybox's images that are in colours. Of the others nine in ten show the surface
            (normals and depths), and one in ten albedo. 1 trains a teacher of colours alone.
        lr: learning rate after 200 steps of warm-up.
        decay: fraction of the steps, the last ones, over which the learning rate falls linearly to 0.
        images: number of renders of the toybox.
        ema: decay of the running mean of the weights, which is what is saved.
        seed: seed of all random numbers.
        save_every: steps between checkpoints, each with a sample grid.
    """

    data: str = "toybox"
    size: Annotated[int, Within(8, 64)] = 64
    steps: Annotated[int, Within(1, STEPS)] = 16_000
    batch: Annotated[int, Within(1, 65_536)] = 32
    coarse: Annotated[int, Within(0, STEPS)] = 12_000
    part: Annotated[float, Within(0, 1e6)] = 3.0
    start: str = ""
    colours: Annotated[float, Within(0, 1)] = 0.3
    lr: Annotated[float, Within(1e-9, 1)] = 1e-3
    decay: Annotated[float, Within(1e-3, 1)] = 0.25
    images: Annotated[int, Within(1, 10_000_000)] = 16_800
    ema: Annotated[float, Within(0, 1)] = 0.998
    seed: Annotated[int, Within(0, 2**62 - 1)] = 0
    save_every: Annotated[int, Within(1, STEPS)] = 500

    def __post_init__(self):
        check(self)

    @staticmethod
    def usual(data: str) -> FitConfig:
        """Return the default settings for a kind of data."""
        if data == "toybox":
            return FitConfig()
        if data == "digits":
            return FitConfig(data, size=8, steps=DIGITS_STEPS, batch=128, coarse=0, decay=0.5, ema=0.999)
        return FitConfig(data, steps=20_000, coarse=0, decay=0.5)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides in pixels of the training images."""
        return (self.size // 2, self.size) if self.coarse else (self.size,)

    def is_coarse(self, step: int) -> bool:
        """Return whether a step, counted from 0, shows images of half the side."""
        return self.coarse > 0 and (step < self.coarse or step % 2 == 1)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        remaining = (self.steps - step) / (self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / 200, remaining)
