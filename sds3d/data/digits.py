"""Handwritten digits: the 1,797 images of 8 x 8 pixels of UCI's optical recognition set, as scikit-learn has them.

Every third image of each digit is held out: 1,201 are for training, 596 for evaluation. Training on held-out images
makes every evaluation invalid.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sds3d.data.pictures import Pictures

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PARTS = ("train", "held-out")
FILE = Path(__file__).with_suffix(".npz")  # written by scripts/pack_digits.py


def prompt(digit: int) -> str:
    """Return the prompt for a digit."""
    return f"a handwritten {NAMES[digit]}"


def captions(digit: int) -> tuple[str, ...]:
    """Return all captions for a digit."""
    name = NAMES[digit]
    return (prompt(digit), f"a {name}", name, f"the handwritten digit {name}")


@cache
def _all() -> tuple[Tensor, Tensor]:
    """All images (N, 1, 8, 8) uint8, where 255 is ink, and their digits (N,)."""
    with np.load(FILE) as stored:
        ink, digits = torch.from_numpy(stored["ink"]), torch.from_numpy(stored["digits"])  # (N, 8, 8) in [0, 16], (N,)
    return ink.double().mul(255 / 16).round().to(torch.uint8)[:, None], digits.long()


def labels(part: str = "train") -> Tensor:
    """Return the digits of ``pictures(part)``, (N,) long."""
    return _all()[1][_indices(part)]


def pictures(part: str = "train") -> Pictures:
    """Return the images of a part, "train" or "held-out", with their captions."""
    index = _indices(part)
    images, digits = _all()
    return Pictures(images[index], [captions(digit) for digit in digits[index].tolist()])


def _indices(part: str) -> Tensor:
    """The indices of the images in a part."""
    assert part in PARTS, part
    digits = _all()[1]
    nth = torch.zeros(len(digits), dtype=torch.long)
    for digit in range(10):
        mask = digits == digit
        nth[mask] = torch.arange(int(mask.sum()))
    held_out = nth % 3 == 2
    return (held_out if part == "held-out" else ~held_out).nonzero()[:, 0]
