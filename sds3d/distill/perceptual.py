"""How different two images look, by name: in the frozen teacher's own features, in pixels, or by LPIPS.

"teacher" needs no download: the maps of the teacher's way down at a low noise level, each place's vector scaled to
length 1 as LPIPS does (Zhang et al., arXiv 1801.03924, eq. 1), plus the pixels themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sds3d.diffusion.noise import noised
from sds3d.distill.critics import Featured

DISTANCES = ("teacher", "pixels", "lpips")
LEVEL = 0.1  # t at which the teacher looks, without noise


def distance(name: str, teacher: Featured, device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """A distance of x from y, (B, C, h, w) each in the teacher's space -> (B,), differentiable in x.

    Raises:
        ValueError: unknown name, or LPIPS is not installed.
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

    def look(z: Tensor) -> list[Tensor]:
        return teacher.features(teacher.network, noised(z, torch.zeros_like(z), alpha, sigma), t, [""] * len(z))

    with torch.no_grad():
        wanted = look(y)
    total = _pixels(x, y)
    for ours, theirs in zip(look(x), wanted):
        apart = F.normalize(ours, dim=1) - F.normalize(theirs, dim=1)
        total = total + apart.square().sum(1).flatten(1).mean(1)
    return total


def _lpips(teacher: Featured, device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS with VGG features on images of at least 64 pixels."""
    try:
        import lpips
    except ImportError as error:
        raise ValueError("the distance lpips is not installed; pip install sds3d[lpips], or give teacher") from error
    judge = lpips.LPIPS(net="vgg").to(device).requires_grad_(False)

    def images(x: Tensor) -> Tensor:
        shown = 2 * teacher.decode(x) - 1
        return F.interpolate(shown, 64, mode="bilinear") if shown.shape[-1] < 64 else shown

    return lambda x, y: judge(images(x), images(y)).flatten()
