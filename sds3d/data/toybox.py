"""The toybox: captioned objects with exact geometry, drawn by rule.

A caption is

    [a|an|the] [small|large] [colour] KIND [with a COLOUR PART] [on a COLOUR background] [, VIEW view] [, QUALITY]
    [a|an|the] [small|large] [colour] SOLID on a [colour] SOLID ...

What a caption does not mention varies in training, and has a default value here: scale 1, the kind's default colours, a
white background. `parse` turns a prompt into a `Toy`, whose exact signed distance, colours, mesh, silhouettes and views
are the ground truth for training teachers and evaluating assets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sds3d.cameras import Cameras
from sds3d.data.kinds import KINDS, STACKS, Kind
from sds3d.data.tracing import (
    COVERAGE,
    NORMAL,
    POSITION,
    domain_images,
    normals,
    part_distances,
    shade,
    trace,
)
from sds3d.prompts import COLOURS, VIEW_WORDS, named_background, unknown_words, words

if TYPE_CHECKING:
    import trimesh

SIZES = {"small": 0.75, "": 1.0, "large": 1.1}
QUALITIES: dict[str, tuple[str, ...]] = {  # degradation of an image -> words for it in captions
    "blur": ("blurry", "out of focus"),
    "noise": ("noisy",),
    "fade": ("low contrast", "dull"),
    "burn": ("oversaturated",),
    "coarse": ("low resolution",),
    "darken": ("dark", "gloomy"),
    "any": ("low quality", "ugly", "unrealistic"),
}
_PLAIN_WORDS = ("a", "an", "the", "with", "on", "and", "background", "small", "large", "view")


VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        set(_PLAIN_WORDS)
        | set(COLOURS)
        | set(KINDS)
        | {k.second for k in {**KINDS, **STACKS}.values() if k.second}
        | {w for view in VIEW_WORDS for w in words(view)}
        | {w for group in QUALITIES.values() for phrase in group for w in words(phrase)}
    )
)

# One prompt for each of twelve kinds, in colour combinations that no training contains (`is_held_out`). Committed
# before the teacher was trained; the last three name two colours.
HELD_OUT_PROMPTS: tuple[str, ...] = (
    "a blue mug",
    "a green rocket",
    "a green chair",
    "a yellow house",
    "a pink snowman",
    "a red teapot",
    "a blue car",
    "an orange fish",
    "a yellow robot",
    "a purple boat with a white sail",
    "a blue lamp with a white stand",
    "a green cube on a red cylinder",
)


def is_held_out(kind: str, main: str, second: str) -> bool:
    """Return whether this kind in these colours must not occur in training.

    For every kind, two main colours are held out with any second colour, and so is one in eleven of the pairs of
    different colours.
    """
    names, colours = [*KINDS, *STACKS], list(COLOURS)
    k, m, s = names.index(kind), colours.index(main), colours.index(second)
    if kind in KINDS and (m + 5 * k) % 6 == 0:
        return True
    return main != second and (3 * m + s + k) % 11 == 0


@dataclass(frozen=True)
class Toy:
    """One object of known shape and colour.

    Args:
        name: a key of KINDS or STACKS.
        main, second: colour names.
        scale: size factor.
        background: colour name of the plain background.
    """

    name: str
    main: str
    second: str
    scale: float = 1.0
    background: str = ""

    @property
    def kind(self) -> Kind:
        """The entry of KINDS or STACKS."""
        return KINDS[self.name] if self.name in KINDS else STACKS[self.name]

    def sdf(self, points: Tensor) -> Tensor:
        """Return the signed distance, (N, 3) -> (N,), negative inside."""
        return part_distances(self.kind, points / self.scale).amin(-1) * self.scale

    def colours(self, points: Tensor) -> Tensor:
        """Return the shaded colour of the surface nearest to each point, (N, 3) -> (N, 3) in [0, 1]."""
        names = {"main": self.main, "second": self.second}
        palette = torch.tensor([COLOURS[names.get(slot, slot)] for _, slot in self.kind.parts])
        inner = points / self.scale
        part = part_distances(self.kind, inner).argmin(-1)
        return palette[part] * shade(normals(self.kind, inner))[:, None]

    def render(
        self, cameras: Cameras, resolution: int = 64, supersample: int = 2, domain: str = "colours"
    ) -> tuple[Tensor, Tensor]:
        """Render true views.

        Args:
            domain: what the images show, a key of `sds3d.domains.WORDS`.

        Returns:
            Images (B, 3, H, W), in colours and albedo on the toy's background, white by default, and silhouettes
            (B, 1, H, W), both in [0, 1].
        """
        layers = self._layers(cameras, resolution, supersample)
        main, second = (torch.tensor([COLOURS[c]]).expand(len(cameras), 3) for c in (self.main, self.second))
        background = background_colour(self.background).expand(len(cameras), 3)
        return domain_images(layers, main, second, background, domain, cameras), layers[:, COVERAGE]

    def albedo(self, cameras: Cameras, resolution: int = 64) -> Tensor:
        """Render the images (B, 3, H, W) of `render` without light."""
        return self.render(cameras, resolution, domain="albedo")[0]

    def surface(self, cameras: Cameras, resolution: int = 64) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the rays through the pixels' centres hit.

        Returns:
            The distance from the camera (B, 1, H, W) in scene units, the outward unit normals in world axes
            (B, 3, H, W), both 0 where a ray hits nothing, and whether it hits the toy (B, 1, H, W), bool. Points
            outside of the box [-1, 1]^3 are taken for the nearest ones in it.
        """
        layers = self._layers(cameras, resolution, supersample=1)
        hit = layers[:, COVERAGE] > 0.5
        away = (layers[:, POSITION] - cameras.positions()[:, :, None, None]).norm(dim=1, keepdim=True)
        return torch.where(hit, away, 0), layers[:, NORMAL], hit

    def _layers(self, cameras: Cameras, resolution: int, supersample: int) -> Tensor:
        return trace(self.kind, cameras, torch.full((len(cameras),), self.scale), resolution, supersample)

    def mesh(self, resolution: int = 96) -> trimesh.Trimesh:
        """Return the true surface in world coordinates, with shaded vertex colours."""
        import trimesh
        from skimage.measure import marching_cubes

        axis = torch.linspace(-1.05, 1.05, resolution)
        grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
        distance = torch.cat([self.sdf(chunk) for chunk in grid.split(65536)]).view((resolution,) * 3)
        step = float(axis[1] - axis[0])
        corners, faces, _, _ = marching_cubes(distance.numpy(), 0.0, spacing=(step,) * 3)
        corners = torch.from_numpy(corners.copy()).float() - 1.05
        colours = (self.colours(corners) * 255).round().byte().numpy()
        return trimesh.Trimesh(corners.numpy(), faces, vertex_colors=colours, process=False)


def background_colour(name: str) -> Tensor:
    """Return the RGB of a background, (3,): the named colour, or pure white for ""."""
    return torch.ones(3) if not name else torch.tensor(COLOURS[name])


def parse(prompt: str) -> Toy:
    """Parse a prompt into a toy, with default values for everything that it does not mention.

    Raises:
        ValueError: a word is unknown (the message names the nearest known ones), or the text is no caption.
    """
    unknown = unknown_words(prompt, VOCABULARY)
    if unknown:
        raise ValueError(f"the toybox does not know {unknown}")
    colour = "|".join(COLOURS)
    text = " ".join(words(prompt))
    for group in (VIEW_WORDS, *QUALITIES.values()):
        for phrase in group:
            text = re.sub(rf"\b{phrase}\b", "", text)
    background = named_background(text)
    text = re.sub(rf"\bon an? {background} background\b", "", text) if background else text
    head = rf"(?:(?:a|an|the) )?(?:(small|large) )?(?:({colour}) )?"
    kinds, solids = "|".join(KINDS), "|".join(sorted({p for s in STACKS for p in s.split(" on ")}))
    stack = re.fullmatch(rf"{head}({solids}) on (?:an? |the )?(?:({colour}) )?({solids})", text.strip())
    single = re.fullmatch(rf"{head}({kinds})(?: (?:with|and) (?:an? |the )?({colour}) (\w+))?", text.strip())
    if stack and f"{stack[3]} on {stack[5]}" in STACKS:
        kind = STACKS[f"{stack[3]} on {stack[5]}"]
        main, second = stack[2] or kind.main_default, stack[4] or kind.second_default
        return Toy(f"{stack[3]} on {stack[5]}", main, second, SIZES[stack[1] or ""], background)
    if single and (not single[5] or single[5] == KINDS[single[3]].second):
        kind = KINDS[single[3]]
        main = single[2] or kind.main_default
        second = single[4] or (main if kind.second_default == "main" else kind.second_default)
        return Toy(single[3], main, second, SIZES[single[1] or ""], background)
    raise ValueError(
        f"the toybox cannot draw '{prompt}'; it draws e.g. 'a red mug with a white handle', 'a small blue chair' or "
        f"'a green cube on a yellow cylinder' (kinds: {', '.join(KINDS)})"
    )
