"""Draws training captions: the colours of an object, and what its caption mentions.

Colours are never a held-out combination. The caption often leaves out a second colour that is the kind's default, and
nearly always names another one. A second colour that is not mentioned is the default about seven times in eight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from sds3d.data.kinds import KINDS, STACKS
from sds3d.data.toybox import QUALITIES, is_held_out
from sds3d.prompts import COLOURS

T = TypeVar("T")


@dataclass(frozen=True)
class Captioned:
    """The caption and the content of one training image.

    Args:
        text: the caption, without view words.
        main, second, background: colour names; background "" is white.
        quality: a key of QUALITIES other than "any", or "" for a clean image.
    """

    text: str
    main: str
    second: str
    background: str
    quality: str


class CaptionDraw:
    """Draws captions for kinds.

    Args:
        rng: source of all random choices.
        background_share: fraction of images on a background that is not white; the caption always names it.
        degraded_share: fraction of images that are degraded; the caption always says so.
    """

    def __init__(self, rng: torch.Generator, background_share: float = 0.15, degraded_share: float = 0.06):
        self.rng = rng
        self.background_share = background_share
        self.degraded_share = degraded_share

    def chance(self, p: float) -> bool:
        """Return True with probability ``p``."""
        return torch.rand((), generator=self.rng).item() < p

    def choose(self, options: Sequence[T]) -> T:
        """Choose one of the options with equal probabilities."""
        return options[int(torch.randint(len(options), (), generator=self.rng))]

    def colours(self, name: str) -> tuple[str, str]:
        """Draw the main and second colour of a kind or stack, never a held-out pair."""
        kind = KINDS.get(name) or STACKS[name]
        while True:
            main = self.choose(list(COLOURS))
            default = main if kind.second_default == "main" else kind.second_default
            canonical = not kind.second or (name in KINDS and self.chance(0.3))
            second = default if canonical else self.choose(list(COLOURS))
            if not is_held_out(name, main, second):
                return main, second

    def __call__(self, name: str, size: str) -> Captioned:
        """Draw colours and caption of one image of ``name`` (a key of KINDS or STACKS) at ``size`` (a key of SIZES)."""
        main, second = self.colours(name)
        size_word = size if self.chance(0.95) else ""
        main_word = main if self.chance(0.95) else ""
        if name in STACKS:
            upper, lower = name.split(" on ")
            second_word = second if self.chance(0.95) else ""
            text = f"{_noun(size_word, main_word, upper)} on {_noun('', second_word, lower)}"
        else:
            kind = KINDS[name]
            default = main if kind.second_default == "main" else kind.second_default
            text = _noun(size_word, main_word, name)
            if kind.second and self.chance(0.4 if second == default else 0.95):
                text += f" {'and' if self.chance(0.1) else 'with'} {_noun('', second, kind.second)}"
        bare = text.removeprefix("a ").removeprefix("an ")
        text = text if self.chance(0.85) else f"the {bare}" if self.chance(0.4) else bare
        background = self.choose([c for c in COLOURS if c != "white"]) if self.chance(self.background_share) else ""
        if background:
            text += f" on {_noun('', background, 'background')}"
        quality = self.choose([q for q in QUALITIES if q != "any"]) if self.chance(self.degraded_share) else ""
        if quality:
            text += ", " + self.choose(QUALITIES["any"] if self.chance(0.3) else QUALITIES[quality])
        return Captioned(text, main, second, background, quality)


def _noun(size: str, colour: str, noun: str) -> str:
    phrase = " ".join(w for w in (size, colour, noun) if w)
    plural = noun in ("legs", "wings")
    return phrase if plural else f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
