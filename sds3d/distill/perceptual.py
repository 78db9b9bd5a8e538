"""Distances between images by name: in the frozen teacher's features, in pixels, or LPIPS.

"teacher" needs no download. It compares the feature maps of the teacher's encoder at a low noise level, normalised over
channels as in LPIPS (Zhang et al., arXiv 1801.03924, eq. 1), and adds the "pixels" distance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sds3d.diffusion.noise import noised
from sds3d.distill.critics import Featured

DISTANCES = ("teacher", "pixels", "lpips")
LEVEL = 0.1  # t of the teacher's features; the input is scaled by alpha, without noise


def distance(name: str, teacher: Featured, device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of x and y, each (B, C, h, w) in the teacher's space, that gives their distances (B,).

    It is differentiable in x.

    Raises:
        ValueError: the name is unknown, or LPIPS is not installed.
    """
    if name == "pixels":
        return _pixels
    if name == "teacher":
        return lambda x, y: _features(teacher, x, y)
    if name == "lpips":
        return _lpips(teacher, device)
    raise ValueError(f"the distance is {name!r}; give {', '.join(DISTANCES)}")


def _pixels(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square().flatten(1).mean(1)


def _features(teacher: Featured, x: Tensor, y: Tensor) -> Tensor:
    t = torch.full((len(x),), LEVEL, dtype=x.dtype, device=x.device)
    alpha, sigma = teacher.schedule.alpha_sigma(t)

    def features(z: Tensor) -> list[Tensor]:
        return teacher.features(teacher.network, noised(z, torch.zeros_like(z), alpha, sigma), t, [""] * len(z))

    with torch.no_grad():
        maps_y = features(y)
    total = _pixels(x, y)
    for map_x, map_y in zip(features(x), maps_y):
        difference = F.normalize(map_x, dim=1) - F.normalize(map_y, dim=1)
        total = total + difference.square().sum(1).flatten(1).mean(1)
    return total


def _lpips(teacher: Featured, device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return LPIPS with VGG features; images of fewer than 64 pixels are enlarged to 64."""
    try:
        import lpips
    except ImportError as error:
        raise ValueError("the distance lpips is not installed; pip install sds3d[lpips], or give teacher") from error
    model = lpips.LPIPS(net="vgg").to(device).requires_grad_(False)

    def decode(x: Tensor) -> Tensor:
        images = 2 * teacher.decode(x) - 1
        return F.interpolate(images, 64, mode="bilinear") if images.shape[-1] < 64 else images

    return lambda x, y: model(decode(x), decode(y)).flatten()
