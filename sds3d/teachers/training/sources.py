"""Training data of teachers: renders of the toybox, or pictures with captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sds3d import domains
from sds3d.cameras import Cameras
from sds3d.data import digits, folder, renders
from sds3d.data.captions import CaptionDraw
from sds3d.data.kinds import KINDS
from sds3d.data.pictures import Pictures
from sds3d.data.toybox import VOCABULARY, background_colour
from sds3d.data.tracing import domain_images
from sds3d.networks.text import PROMPT_WORDS
from sds3d.networks.unet import UNetConfig
from sds3d.prompts import COLOURS, with_view

NULL_FRACTION = 0.1  # of captions to drop, for guidance (Ho and Salimans, arXiv 2207.12598)
OTHER_PARTS = {"albedo": 0.1, "normals": 0.45, "depths": 0.45}  # of the toybox's images that are not in colours
DEPTHS_WEIGHT = 6.0  # in the loss: an image of depths has a third of the contrast of others, and errors count squared
GRID_PROMPTS = (  # prompts of the sample grid; none is held out
    "a red mug with a white handle",
    "a red rocket",
    "a blue chair",
    "a red house",
    "a white snowman",
    "a yellow car",
    "a green fish",
    "a yellow ball",
)

NETWORKS = {  # side of the pictures in pixels -> U-Net
    8: UNetConfig((32, 64, 64), (1, 1), condition=128, text=64, size=8, fold=1, dropout=0.15),
    32: UNetConfig((48, 96, 160), (1, 2), size=32, fold=1, dropout=0.1),
    64: UNetConfig(dropout=0.1),
}


@dataclass
class Batch:
    """Training images.

    Args:
        x: (B, C, S, S) clean, in [-1, 1].
        captions: B captions.
        part: (B, 1, S, S), 1 where the second colour shows, else 0; None if unknown.
        cameras: B cameras, or None if the images have none.
        camera_mask: (B,) bool, whether the network gets the camera.
        weight: (B,) of each image in the loss; None is 1.
    """

    x: Tensor
    captions: list[str]
    part: Tensor | None = None
    cameras: Cameras | None = None
    camera_mask: Tensor | None = None
    weight: Tensor | None = None


class Source(Protocol):
    """A source of training images.

    Attributes:
        vocabulary: every word of the captions.
        network: sizes of a U-Net that fits the images.
        prompts: examples of captions; the sample grid shows the first ones.
    """

    vocabulary: tuple[str, ...]
    network: UNetConfig

    @property
    def prompts(self) -> tuple[str, ...]:
        """See above."""
        ...

    def size(self, count: int) -> int:
        """Return the number of images. A source that makes its images makes ``count``."""
        ...

    def prepare(self, out: Path, count: int, seed: int) -> Iterator[int]:
        """Make missing images in the folder of the training; yield the number of images that are ready."""
        ...

    def batches(self, out: Path, rng: torch.Generator) -> Callable[[int], Batch]:
        """Return a function that draws a batch of a given size at random."""
        ...


class Toybox:
    """Renders of procedural toys, with their cameras; see `sds3d.data.toybox`.

    Args:
        colours: see `FitConfig`.
    """

    network = UNetConfig()

    def __init__(self, colours: float = 0.3):
        self.parts = {"colours": colours} | {name: part * (1 - colours) for name, part in OTHER_PARTS.items()}
        shown = [word for name, word in domains.WORDS.items() if word and self.parts[name] > 0]
        self.vocabulary = tuple(sorted({*VOCABULARY, *shown}))

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of the sample grid, then captions."""
        return _toy_prompts()

    def size(self, count: int) -> int:
        """See `Source.size`."""
        return count

    def prepare(self, out: Path, count: int, seed: int) -> Iterator[int]:
        """See `Source.prepare`."""
        return renders.build(out / "renders", count, seed)

    def batches(self, out: Path, rng: torch.Generator) -> Callable[[int], Batch]:
        """See `Source.batches`."""
        return RenderBatches(renders.Renders(out / "renders"), rng, self.parts)


@cache
def _toy_prompts() -> tuple[str, ...]:
    rng = torch.Generator().manual_seed(0)
    draw, names = CaptionDraw(rng, 0, 0), list(KINDS)
    drawn = (draw(names[i % len(names)], "").text for i in range(12 * len(names)))
    return tuple(dict.fromkeys((*GRID_PROMPTS, *drawn)))


class Captioned:
    """Captioned pictures in memory.

    Args:
        pictures: pictures of one size, 8, 32 or 64 pixels, which determines the network.
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
            pick, drop = torch.rand((2, size), generator=rng)
            captions = [texts[int(place * len(texts))] for texts, place in zip(chosen.captions, pick.tolist())]
            dropped = (drop < NULL_FRACTION).tolist()
            captions = ["" if is_null else text for text, is_null in zip(captions, dropped)]
            return Batch(chosen.images.float() / 127.5 - 1, captions)

        return draw


def degrade(image: Tensor, quality: str, rng: torch.Generator) -> Tensor:
    """Return an image (3, H, W) in [0, 1] degraded in the way that a key of `toybox.QUALITIES` names."""
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
    """Draws training batches from stored renders, painted and captioned anew, each image in a random domain.

    Args:
        store: the renders.
        rng: source of all random choices.
        parts: domain -> its part of the images, of sum 1.
    """

    def __init__(self, store: renders.Renders, rng: torch.Generator, parts: Mapping[str, float]):
        self.store, self.rng, self.parts = store, rng, parts
        self.captions, self.plain_captions = CaptionDraw(rng), CaptionDraw(rng, 0, 0)

    def __call__(self, size: int) -> Batch:
        """Draw ``size`` training images."""
        index = torch.randint(len(self.store), (size,), generator=self.rng)
        parts = torch.tensor(list(self.parts.values()))
        chosen = [list(self.parts)[i] for i in torch.multinomial(parts, size, True, generator=self.rng).tolist()]
        rows = [
            (self.captions if domain == "colours" else self.plain_captions)(self.store.names[i], self.store.sizes[i])
            for i, domain in zip(index.tolist(), chosen, strict=True)
        ]
        main, second = (torch.tensor([COLOURS[getattr(r, k)] for r in rows]) for k in ("main", "second"))
        layers, cameras = self.store.batch(index), self.store.cameras[index]
        backgrounds = torch.stack([background_colour(r.background) for r in rows])
        images = torch.empty(size, 3, *layers.shape[2:])
        for domain in dict.fromkeys(chosen):
            of = torch.tensor([i for i, other in enumerate(chosen) if other == domain])
            images[of] = domain_images(layers[of], main[of], second[of], backgrounds[of], domain, cameras[of])
        for i, row in enumerate(rows):
            if row.quality:
                images[i] = degrade(images[i], row.quality, self.rng)
        draws = torch.rand(3, size, generator=self.rng)
        dropped = draws[2] < NULL_FRACTION
        camera_mask = (draws[0] < 0.8) & ~(dropped & (draws[1] < 0.5))
        view_mask = draws[1] < torch.where(camera_mask, 0.15, 0.9)
        with_views = with_view([r.text for r in rows], cameras)
        texts = [view if use else r.text for view, use, r in zip(with_views, view_mask.tolist(), rows)]
        captions = ["" if is_null else text for text, is_null in zip(texts, dropped.tolist())]
        captions = [domains.with_domain([text], domain)[0] for text, domain in zip(captions, chosen, strict=True)]
        in_colours = torch.tensor([domain in ("colours", "albedo") for domain in chosen])
        part = (layers[:, 1:2] > 0).float() * in_colours[:, None, None, None]
        weight = torch.tensor([DEPTHS_WEIGHT if domain == "depths" else 1.0 for domain in chosen])
        return Batch(images * 2 - 1, captions, part, cameras, camera_mask, weight)


def build_source(data: str, size: int = 64, colours: float = 0.3) -> tuple[Source, list[str]]:
    """Return a source and the list of skipped pictures.

    Args:
        data: "toybox", "digits", or a folder of captioned pictures.
        size: side in pixels of a folder's pictures, 32 or 64.
        colours: fraction of the toybox's images that are in colours, see `FitConfig`.

    Raises:
        ValueError: there is no such folder, nothing in it can be used, or there is no network for this size.
    """
    if data == "toybox":
        return Toybox(colours), []
    if data == "digits":
        return Captioned(digits.pictures()), []
    if size not in NETWORKS:
        raise ValueError(f"size is {size}; give {', '.join(map(str, NETWORKS))} pixels a side")
    contents = folder.read(data, size, PROMPT_WORDS)
    return Captioned(contents.pictures), contents.skipped
