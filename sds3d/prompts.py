"""Prompts: their words, the colours they name, and view words, as in DreamFusion (arXiv 2209.14988, section 3.3)."""

from __future__ import annotations

import difflib
import re
import unicodedata
import warnings
from collections.abc import Collection, Sequence

from sds3d.cameras import Cameras

# Colour words with the RGB values of the toybox's paints and of a scene's backgrounds.
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
    """Return the colour in "... on a COLOUR background"; "" if the prompt names none."""
    match = re.search(rf"\bon an? ({'|'.join(COLOURS)}) background\b", " ".join(words(prompt)))
    return match[1] if match else ""


def view_word(azimuth: float, elevation: float) -> str:
    """Return the view words for a camera at this azimuth (degrees, 0 = front, not limited) and elevation (degrees).

    The view is overhead above 60 degrees of elevation, else front within 45 degrees of azimuth 0, back within 45
    degrees of azimuth 180, else side.
    """
    if elevation > 60:
        return "overhead view"
    away = abs((azimuth + 180) % 360 - 180)  # degrees from the front, 0 to 180
    if away <= 45:
        return "front view"
    return "back view" if away >= 135 else "side view"


def view_negatives(azimuth: float, elevation: float) -> dict[str, float]:
    """Return Perp-Neg's weight of each other view, 0 to 1, for a camera at this azimuth and elevation (degrees).

    The weight of front and back is the angle to the camera over 180 degrees; that of the nearer side is the angle over
    90 degrees. All are 0 for an overhead view.
    """
    if view_word(azimuth, elevation) == "overhead view":
        return dict.fromkeys(VIEW_WORDS[:3], 0.0)
    away = abs((azimuth + 180) % 360 - 180)
    return {"front view": away / 180, "side view": abs(away - 90) / 90, "back view": 1 - away / 180}


def view_blend(azimuth: float, elevation: float) -> dict[str, float]:
    """Return the weights, of sum 1, with which view embeddings are mixed for a camera at this azimuth and elevation.

    Front, side and back, 90 degrees apart, are interpolated linearly. Overhead grows from 0 at an elevation of 45
    degrees to 1 at 75, so that it is 1/2 at 60, where ``view_word`` changes.
    """
    away = abs((azimuth + 180) % 360 - 180)
    above = min(max((elevation - 45) / 30, 0.0), 1.0)
    side = 1 - abs(away - 90) / 90
    around = {"front view": max(1 - away / 90, 0.0), "side view": side, "back view": max(away / 90 - 1, 0.0)}
    return {view: (1 - above) * weight for view, weight in around.items()} | {"overhead view": above}


def with_view(prompt: str | Sequence[str], cameras: Cameras) -> list[str]:
    """Add view words to prompts: returns one prompt per camera, as "a red mug, side view".

    Args:
        prompt: one for all cameras, or B of them. The null prompt "" does not change.
        cameras: B cameras.
    """
    prompts = [prompt] * len(cameras) if isinstance(prompt, str) else list(prompt)
    assert len(prompts) == len(cameras), (len(prompts), len(cameras))
    angles = zip(cameras.azimuth.tolist(), cameras.elevation.tolist(), strict=True)
    return [f"{p}, {view_word(*pair)}" if p else "" for p, pair in zip(prompts, angles, strict=True)]


def words(prompt: str) -> list[str]:
    """Split a prompt into words, in Unicode's composed form (NFC) and case-folded.

    A word is a run of letters, marks and digits of any script ("1.5" is one), a single Han or kana character (their
    sentences have no spaces), or a single symbol ("№", "&"). Spaces and other punctuation separate words.
    """
    text = "".join(c for c in unicodedata.normalize("NFC", prompt.casefold()) if unicodedata.category(c) != "Cf")
    kinds = "".join(_kind(c) for c in text)
    return [text[match.start() : match.end()] for match in re.finditer(_WORD, _with_points(text, kinds))]


_WORD = r"[wm]+|[cs]m*"  # matches kinds of characters (see `_kind`), not the characters
_ALONE = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))


def _kind(character: str) -> str:
    """w: part of a word, m: a mark on the character before it, c: a word by itself, s: a symbol, blank: a separator."""
    category = unicodedata.category(character)
    if category[0] == "M":
        return "m"
    if category[0] in "LN":
        return "c" if any(first <= ord(character) <= last for first, last in _ALONE) else "w"
    return "s" if category[0] == "S" or character in "&%#@" else " "


def _with_points(text: str, kinds: str) -> str:
    """The kinds, in which a point or comma between two digits is part of the word."""
    inner = {match.start() for match in re.finditer(r"(?<=\d)[.,](?=\d)", text)}
    return "".join("w" if i in inner else kind for i, kind in enumerate(kinds))


_WEIGHTS = re.compile(
    r"\([^():]{0,80}:\s{0,8}[+-]?[\d.]{1,9}\s{0,8}\)"  # (red:1.3); lengths are bounded, else a long text takes minutes
    r"|\([^()]{0,80}\)[\d.]{1,9}"  # (red)1.3
    r"|\(\([^()]{0,80}\){1,9}"  # ((red))
    r"|\[[^\[\]]{0,80}\]{1,9}"  # [red]
    r"|(?<!\w)\w{1,80}\)?(?:\+\+|--)(?!\w)"  # red++
)


def weighted(prompt: str) -> str:
    """Return the first weighted word in the syntax of other programs, as "(red:1.3)" or "((red))"; "" if none."""
    match = _WEIGHTS.search(prompt)
    return match[0] if match else ""


def warn_of_weights(prompt: str) -> None:
    """Warn if a prompt has a weighted word (see `weighted`): weights are not applied."""
    piece = weighted(prompt)
    if piece:
        warnings.warn(
            f"{piece!r} looks like a weighted word; weights are not applied, and the text is read as it is written",
            stacklevel=3,
        )


def named_view(prompt: str) -> str:
    """Return the view that a prompt names, as "side view" in "a mug, side view" or "side view of a mug"; "" if none.

    A prompt names a view if one of its parts between commas ends with the view's words, or begins with them and "of".
    "a car with side view mirrors" names none.
    """
    for part in re.split(r"[,;.]", prompt):
        text = re.sub(rf" on an? ({'|'.join(COLOURS)}) background$", "", " ".join(words(part)))
        for view in VIEW_WORDS:
            if re.search(rf"(^| ){view}$|^(an? |the )?{view} of( |$)", text):
                return view
    return ""


def unknown_words(prompt: str, known: Collection[str]) -> str:
    """List a prompt's unknown words with the nearest known ones, as ``'mugg' (nearest: mug)``; "" if all are known."""
    phrases = []
    for word in dict.fromkeys(w for w in words(prompt) if w not in known):
        near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
        phrases.append(f"'{word}'" + (f" (nearest: {', '.join(near)})" if near else ""))
    return ", ".join(phrases)
