"""Prompts: their words, the colours they name, and view words, as in DreamFusion (arXiv 2209.14988, section 3.3)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

from sds3d.cameras import Cameras

# Colour words, as the toybox paints them and as the backgrounds of a scene are named.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.12, 0.12),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.95, 0.83, 0.12),
    "green": (0.16, 0.62, 0.22),
    "cyan": (0.15, 0.75, 0.78),
    "blue": (0.15, 0.28, 0.82),
    "purple": (0.52, 0.20, 0.68),
    "pink": (0.96, 0.50, 0.68),
    "brown": (0.45, 0.27, 0.13),
    "white": (0.93, 0.93, 0.93),
    "grey": (0.52, 0.52, 0.54),
    "black": (0.12, 0.12, 0.13),
}

VIEW_WORDS = ("front view", "side view", "back view", "overhead view")


def named_background(prompt: str) -> str:
    """The colour in "... on a COLOUR background", "" where the prompt names none."""
    found = re.search(rf"\bon an? ({'|'.join(COLOURS)}) background\b", " ".join(words(prompt)))
    return found[1] if found else ""


def view_word(azimuth: float, elevation: float) -> str:
    """The words for a camera at this azimuth (degrees, 0 = front, any turn) and elevation (degrees).

    Overhead above 60 of elevation; otherwise front within 45 of azimuth 0, back within 45 of 180, else side.
    """
    if elevation > 60:
        return "overhead view"
    away = abs((azimuth + 180) % 360 - 180)  # degrees from the front, 0 to 180
    if away <= 45:
        return "front view"
    return "back view" if away >= 135 else "side view"


def view_negatives(azimuth: float) -> dict[str, float]:
    """For Perp-Neg: how much each view word away from this azimuth (degrees) is to be avoided, 0 to 1.

    The front counts by its distance from the camera over 180 degrees, so does the back, and the nearer side over 90.
    """
    away = abs((azimuth + 180) % 360 - 180)
    return {"front view": away / 180, "side view": abs(away - 90) / 90, "back view": 1 - away / 180}


def view_blend(azimuth: float, elevation: float) -> dict[str, float]:
    """How much of each view word's embedding suits a camera at this azimuth and elevation (degrees); adds up to 1.

    Front, side and back change into each other linearly, 90 degrees apart; overhead sets in at 45 of elevation and is
    alone from 75 on, so that the halfway mark is where ``view_word`` begins to say it.
    """
    away = abs((azimuth + 180) % 360 - 180)
    above = min(max((elevation - 45) / 30, 0.0), 1.0)
    side = 1 - abs(away - 90) / 90
    round_it = {"front view": max(1 - away / 90, 0.0), "side view": side, "back view": max(away / 90 - 1, 0.0)}
    return {view: (1 - above) * share for view, share in round_it.items()} | {"overhead view": above}


def with_view(prompt: str | Sequence[str], cameras: Cameras) -> list[str]:
    """One prompt for each camera, as "a red mug, side view".

    Args:
        prompt: one for all cameras, or B of them. "" is the null prompt and stays so.
        cameras: B cameras.
    """
    prompts = [prompt] * len(cameras) if isinstance(prompt, str) else list(prompt)
    assert len(prompts) == len(cameras), (len(prompts), len(cameras))
    places = zip(cameras.azimuth.tolist(), cameras.elevation.tolist(), strict=True)
    return [f"{p}, {view_word(*place)}" if p else "" for p, place in zip(prompts, places, strict=True)]


def words(prompt: str) -> list[str]:
    """Lower-case words of a prompt; everything but letters separates them."""
    return re.findall(r"[a-z]+", prompt.lower())


def unknown_words(prompt: str, known: Collection[str]) -> str:
    """The prompt's unknown words with the nearest known ones, as ``'mugg' (nearest: mug)``; "" if all are known."""
    told = []
    for word in dict.fromkeys(w for w in words(prompt) if w not in known):
        near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
        told.append(f"'{word}'" + (f" (nearest: {', '.join(near)})" if near else ""))
    return ", ".join(told)
