"""What teachers are trained on: the toybox's renders, or pictures with captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sds3d.cameras import Cameras
from sds3d.data import digits, folder, renders
from sds3d.data.captions import CaptionDraw
from sds3d.data.kinds import KINDS
from sds3d.data.pictures import Pictures
from sds3d.data.toybox import VOCABULARY, background_colour
from sds3d.data.tracing import paint
from sds3d.networks.text import PROMPT_WORDS
from sds3d.networks.unet import UNetConfig
from sds3d.prompts import COLOURS, with_view

NULL_SHARE = 0.1  # of the captions are dropped, for guidance (Ho and Salimans, arXiv 2207.12598)
GRID_PROMPTS = (  # none is held out
    "a red mug with a white handle",
    "a red rocket",
    "a blue chair",
    "a red house",
    "a white snowman",
    "a yellow car",
    "a green fish",
    "a yellow ball",
)

NETWORKS = {  # side of the pictures -> the U-Net for them
    8: UNetConfig((32, 64, 64), (1, 1), condition=128, text=64, size=8, fold=1, dropout=0.15),
    32: UNetConfig((48, 96, 160), (1, 2), size=32, fold=1, dropout=0.1),
    64: UNetConfig(dropout=0.1),
}


@dataclass
class Batch:
    """Training images.

    Args:
        x: (B, C, S, S) clean, in [-1, 1].
        captions: B of them.
        part: (B, 1, S, S), 1 where the second colour shows, else 0; None where nobody knows.
        cameras: B cameras, None where images have none.
        seen: (B,) bool, whether the network is told the camera.
    """

    x: Tensor
    captions: list[str]
    part: Tensor | None = None
    cameras: Cameras | None = None
    seen: Tensor | None = None


class Source(Protocol):
    """Where training images come from.

    Attributes:
        vocabulary: every word of the captions.
        network: sizes of a U-Net that fits the images.
        prompts: what it can be asked for; the sample grid shows the first ones.
    """

    vocabulary: tuple[str, ...]
    network: UNetConfig

    @property
    def prompts(self) -> tuple[str, ...]:
        """See above."""
        ...

    def size(self, count: int) -> int:
        """How many images there are, or will be where ``count`` are made."""
        ...

    def prepare(self, out: Path, count: int, seed: int) -> Iterator[int]:
        """Make what is needed first, in the training's folder; yields how many images are ready."""
        ...

    def batches(self, out: Path, rng: torch.Generator) -> Callable[[int], Batch]:
        """What draws so many images at random."""
        ...


class Toybox:
    """Renders of procedural toys, with their cameras; see `sds3d.data.toybox`."""

    vocabulary, network = VOCABULARY, UNetConfig()

    @property
    def prompts(self) -> tuple[str, ...]:
        """Those of the sample grid, then captions."""
        return _toy_prompts()

    def size(self, count: int) -> int:
        """See `Source.size`."""
        return count

    def prepare(self, out: Path, count: int, seed: int) -> Iterator[int]:
        """See `Source.prepare`."""
        return renders.build(out / "renders", count, seed)

    def batches(self, out: Path, rng: torch.Generator) -> Callable[[int], Batch]:
        """See `Source.batches`."""
        return RenderBatches(renders.Renders(out / "renders"), rng)


@cache
def _toy_prompts() -> tuple[str, ...]:
    rng = torch.Generator().manual_seed(0)
    draw, names = CaptionDraw(rng, 0, 0), list(KINDS)
    drawn = (draw(names[i % len(names)], "").text for i in range(12 * len(names)))
    return tuple(dict.fromkeys((*GRID_PROMPTS, *drawn)))


class Captioned:
    """Pictures in memory.

    Args:
        pictures: all of one size, which picks the network: 8, 32 or 64 pixels.
    """

    def __init__(self, pictures: Pictures):
        self.pictures, self.vocabulary = pictures, pictures.vocabulary()
        sizes = NETWORKS[pictures.size]
        self.network = replace(sizes, size=pictures.size, channels=pictures.channels, cameras=False)
        self.prompts = tuple(dict.fromkeys(texts[0] for texts in pictures.captions))

    def size(self, count: int) -> int:
        """See `Source.size`."""
        return len(self.pictures)

    def prepare(self, out: Path, count: int, seed: int) -> Iterator[int]:
        """See `Source.prepare`."""
        yield len(self.pictures)

    def batches(self, out: Path, rng: torch.Generator) -> Callable[[int], Batch]:
        """See `Source.batches`."""

        def draw(size: int) -> Batch:
            index = torch.randint(len(self.pictures), (size,), generator=rng)
            chosen = self.pictures[index.tolist()]
            said, dropped = torch.rand((2, size), generator=rng)
            captions = [texts[int(place * len(texts))] for texts, place in zip(chosen.captions, said.tolist())]
            kept = ["" if drop else text for text, drop in zip(captions, (dropped < NULL_SHARE).tolist())]
            return Batch(chosen.images.float() / 127.5 - 1, kept)

        return draw


def degrade(image: Tensor, quality: str, rng: torch.Generator) -> Tensor:
    """Spoil an image (3, H, W) in [0, 1] in the way a key of `toybox.QUALITIES` names."""
    amount = torch.rand((), generator=rng).item()
    if quality == "blur":
        small_side = int(22 - 10 * amount)
        return F.interpolate(F.interpolate(image[None], small_side, mode="area"), image.shape[-1], mode="bicubic")[
            0
        ].clamp(0, 1)
    if quality == "coarse":
        small_side = 16 if amount < 0.5 else 8
        return F.interpolate(F.interpolate(image[None], small_side, mode="area"), image.shape[-1])[0]
    if quality == "noise":
        return (image + (0.1 + 0.2 * amount) * torch.randn(image.shape, generator=rng)).clamp(0, 1)
    mean = image.mean(0, keepdim=True)
    if quality == "fade":
        return 0.6 + (0.2 + 0.3 * amount) * (image - 0.6)
    if quality == "burn":
        return (0.5 + (1.3 + amount) * (mean + (1.5 + amount) * (image - mean) - 0.5)).clamp(0, 1)
    return image * (0.25 + 0.3 * amount)  # "darken"


class RenderBatches:
    """Draws training batches from stored renders."""

    def __init__(self, store: renders.Renders, rng: torch.Generator):
        self.store, self.rng = store, rng
        self.captions = CaptionDraw(rng)

    def __call__(self, size: int) -> Batch:
        """``size`` training images."""
        index = torch.randint(len(self.store), (size,), generator=self.rng)
        rows = [self.captions(self.store.names[i], self.store.sizes[i]) for i in index.tolist()]
        main, second = (torch.tensor([COLOURS[getattr(r, k)] for r in rows]) for k in ("main", "second"))
        layers = self.store.batch(index)
        rgb, coverage = paint(layers, main, second)
        behind = torch.stack([background_colour(r.background) for r in rows])
        images = rgb + (1 - coverage) * behind[:, :, None, None]
        for i, row in enumerate(rows):
            if row.quality:
                images[i] = degrade(images[i], row.quality, self.rng)
        cameras = self.store.cameras[index]
        draws = torch.rand(3, size, generator=self.rng)
        dropped = draws[2] < NULL_SHARE
        seen = (draws[0] < 0.8) & ~(dropped & (draws[1] < 0.5))
        viewed = with_view([r.text for r in rows], cameras)
        said = draws[1] < torch.where(seen, 0.15, 0.9)
        texts = [v if s else r.text for v, s, r in zip(viewed, said.tolist(), rows)]
        captions = ["" if drop else text for text, drop in zip(texts, dropped.tolist())]
        return Batch(images * 2 - 1, captions, (layers[:, 1:2] > 0).float(), cameras, seen)


def build_source(data: str, size: int = 64) -> tuple[Source, list[str]]:
    """The source of that name, "toybox" or "digits", or of a folder of captioned pictures, and what was skipped there.

    Args:
        size: pixels a side, of a folder's: 32 or 64.

    Raises:
        ValueError: no such folder, or nothing in it that can be used, or a size for which there is no network.
    """
    if data == "toybox":
        return Toybox(), []
    if data == "digits":
        return Captioned(digits.pictures()), []
    if size not in NETWORKS:
        raise ValueError(f"size is {size}; give {', '.join(map(str, NETWORKS))} pixels a side")
    found = folder.read(data, size, PROMPT_WORDS)
    return Captioned(found.pictures), found.skipped
