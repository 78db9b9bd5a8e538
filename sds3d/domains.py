"""Domains: what an image of an object shows, and the word for it in a prompt.

    colours      the object under the light of its world; no word
    albedo       its colours without light
    normals      (n + 1) / 2 for outward unit normals n, in camera axes: x right, y up, z towards the camera
    depths       (z + 1) / 2 for the height z of the visible points over the plane through the origin that faces the
                 camera, in [-1, 1]: what is near is bright (MiDaS, arXiv 1907.01341, shows it so, too)

A pixel is a mean over the pixel, and the background counts as 0: middle grey. (On black, the rim of a depth image has
the largest gradients, and Adam steps by the largest: with true images a mug's F-score is 0.84, on grey 0.94.) A teacher
may know several domains, each by its word: "a red mug, normals" (Wonder3D, arXiv 2310.15008, section 3.2). The word
stays in the null prompt, so guidance does not leave the domain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

WORDS = {"colours": "", "albedo": "albedo", "normals": "normals", "depths": "depths"}
SURFACE = ("normals", "depths")  # domains that show the surface and no colours


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


def heights(points: Tensor, eyes: Tensor) -> Tensor:
    """Return the heights towards the camera (B, 1, H, W) of points (B, 3, H, W), clamped to [-1, 1].

    Args:
        points: in world coordinates, times the coverage; 0 on the background.
        eyes: (B, 3) positions of the cameras, which look at the origin.
    """
    towards = F.normalize(eyes, dim=-1)
    return torch.einsum("bi,bihw->bhw", towards, points)[:, None].clamp(-1, 1)


def picture(values: Tensor) -> Tensor:
    """Return normals (B, 3, H, W) or heights (B, 1, H, W), in [-1, 1], as pixels (B, 3, H, W) in [0, 1]."""
    return ((values + 1) / 2).expand(-1, 3, -1, -1)


def values(picture: Tensor) -> Tensor:
    """Return the normals, or three times the heights, that pixels show: the inverse of `picture`."""
    return 2 * picture - 1
