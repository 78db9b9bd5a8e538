"""Prompts and where they are seen from: view words, as in DreamFusion (arXiv 2209.14988, section 3.3)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

from sds3d.cameras import Cameras

VIEW_WORDS = ("front view", "side view", "back view", "overhead view")


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
