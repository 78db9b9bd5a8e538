"""Domains: what an image of an object shows, and the word for it in a prompt.

    colours      the object under the light of its world; no word
    albedo       its colours without light
    normals      (n + 1) / 2 for outward unit normals n, in camera axes: x right, y up, z towards the camera
    positions    (p + 1) / 2 for the visible points p, in world coordinates, in the box [-1, 1]^3 (SweetDreamer,
                 arXiv 2310.02596, section 3.1)

A pixel of normals or positions is a mean over the pixel, in which the background counts as the vector 0: middle grey. A
teacher may know several domains, each by its word: "a red mug, normals" (Wonder3D, arXiv 2310.15008, section 3.2). The
word stays in the null prompt, so guidance does not leave the domain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORDS = {"colours": "", "albedo": "albedo", "normals": "normals", "positions": "positions"}
VECTORS = ("normals", "positions")  # domains whose pixels are vectors


def with_domain(prompts: Sequence[str], domain: str) -> list[str]:
    """Add the word of a domain to prompts: "a red mug" becomes "a red mug, normals", and "" becomes "normals".

    Examples:
        >>> with_domain(["a red mug", ""], "normals")
        ['a red mug, normals', 'normals']
    """
    word = WORDS[domain]
    return [", ".join(filter(None, (prompt, word))) for prompt in prompts]


def split_domain(prompt: str) -> tuple[str, str]:
    """Return a prompt without its domain's word, and the domain: the inverse of `with_domain`.

    Examples:
        >>> split_domain("a red mug, normals"), split_domain("normals"), split_domain("a red mug, side view")
        (('a red mug', 'normals'), ('', 'normals'), ('a red mug, side view', 'colours'))
    """
    text, _, last = prompt.rpartition(", ")
    domain = next((name for name, word in WORDS.items() if word and word == last), "colours")
    return (prompt, domain) if domain == "colours" else (text, domain)


def turned(normals: Tensor, rotations: Tensor) -> Tensor:
    """Return normals (B, 3, H, W) in world axes as normals in camera axes.

    Args:
        rotations: (B, 3, 3) camera-to-world, see `sds3d.cameras.Cameras.rotations`.
    """
    return torch.einsum("bij,bihw->bjhw", rotations, normals)


def picture(vectors: Tensor) -> Tensor:
    """Return normals or positions in [-1, 1], of any shape, as pixels in [0, 1]."""
    return (vectors + 1) / 2


def vectors(picture: Tensor) -> Tensor:
    """Return the normals or positions that pixels show: the inverse of `picture`."""
    return 2 * picture - 1
