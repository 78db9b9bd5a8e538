"""Classifiers that evaluate drawn images. They were trained on real images only (scripts/train_judge.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from sds3d.networks.classifier import Classifier, ToyClassifier

DIGITS = Path(__file__).with_name("digits.safetensors")
TOYS = Path(__file__).with_name("toybox.safetensors")
CHUNK = 1024  # images per forward
N = TypeVar("N", bound=nn.Module)


class DigitJudge:
    """A classifier of digits, trained on the training part of the digits."""

    size = 8

    def __init__(self, device: torch.device | str = "cpu"):
        self.device, self.net = torch.device(device), _load(Classifier(10), DIGITS, device)

    def features(self, images: Tensor) -> Tensor:
        """Return the features (B, D) of images (B, 3, 8, 8) in [0, 1]."""
        return torch.cat([self.net.features(part) for part in self._read(images)])

    def classify(self, images: Tensor) -> Tensor:
        """Return the predicted digits (B,) of images (B, 3, 8, 8) in [0, 1]."""
        return torch.cat([self.net(part).argmax(1) for part in self._read(images)])

    def _read(self, images: Tensor) -> list[Tensor]:
        assert images.shape[-1] == self.size, images.shape
        return [part.to(self.device).mean(1, keepdim=True) * 2 - 1 for part in images.split(CHUNK)]


class ToyJudge:
    """A classifier of the toybox's objects, trained on true renders in all colours, including held-out ones.

    Attributes:
        kinds, colours: names of the classes, in their order.
    """

    size = 64

    def __init__(self, device: torch.device | str = "cpu"):
        from safetensors import safe_open

        with safe_open(TOYS, "pt") as file:
            self.kinds, self.colours = json.loads(file.metadata()["classes"])
        self.device = torch.device(device)
        self.net = _load(ToyClassifier(len(self.kinds), len(self.colours)), TOYS, device)

    def features(self, images: Tensor) -> Tensor:
        """Return the features (B, D) of images (B, 3, 64, 64) in [0, 1]."""
        return torch.cat([self.net.features(part) for part in self._read(images)])

    def classify(self, images: Tensor) -> Tensor:
        """Return the predicted indices (B, 3) of kind, main and second colour for images (B, 3, 64, 64) in [0, 1]."""
        answers = (self.net(part) for part in self._read(images))
        return torch.cat([torch.stack([logits.argmax(1) for logits in answer], 1) for answer in answers])

    def _read(self, images: Tensor) -> list[Tensor]:
        assert images.shape[1:] == (3, self.size, self.size), images.shape
        return [part.to(self.device) * 2 - 1 for part in images.split(CHUNK)]


def _load(net: N, path: Path, device: torch.device | str) -> N:
    """Load weights into a network and freeze it."""
    from safetensors.torch import load_file

    net.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return net.eval().requires_grad_(False).to(device)
