"""A classifier that was trained on real digits alone, and what it says of drawn ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sds3d.networks.classifier import Classifier

WEIGHTS = Path(__file__).with_name("digits.safetensors")


class DigitJudge:
    """Features and classes of digits; trained by scripts/train_judge.py on the training images."""

    size = 8

    def __init__(self, device: torch.device | str = "cpu"):
        from safetensors.torch import load_file

        self.device, self.net = torch.device(device), Classifier(10)
        self.net.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
        self.net.eval().requires_grad_(False).to(self.device)

    def features(self, images: Tensor) -> Tensor:
        """images (B, 3, 8, 8) in [0, 1] -> (B, D)."""
        return torch.cat([self.net.features(self._read(part)) for part in images.split(2048)])

    def classify(self, images: Tensor) -> Tensor:
        """images (B, 3, 8, 8) in [0, 1] -> (B,) the digit it takes each for."""
        return torch.cat([self.net(self._read(part)).argmax(1) for part in images.split(2048)])

    def _read(self, images: Tensor) -> Tensor:
        assert images.shape[-1] == self.size, images.shape
        return images.to(self.device).mean(1, keepdim=True) * 2 - 1
