"""What a scene's views show: its colours, or its opacity, depth or normals as pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sds3d.cameras import Cameras
from sds3d.media.chart import coloured
from sds3d.students.representation import Scene, Views

LAYERS = ("rgb", "opacity", "depth", "normals")
REACH = 1.0  # depths of this much before and behind the middle of the scene are told apart, scene units


def check(names: Sequence[str]) -> None:
    """Raises ValueError where a layer is not known, or none is named."""
    for name in names or [""]:
        if name not in LAYERS:
            raise ValueError(f"there is no layer {name!r}; give one or more of {', '.join(LAYERS)}")


def layers(scene: Scene, cameras: Cameras, size: int, names: Sequence[str]) -> dict[str, Tensor]:
    """Pictures (B, 3, size, size) in [0, 1] of each layer named, no gradient. Raises ValueError as `check`.

    opacity: black is empty, white is solid. depth: bright is near, dark is far, the same in all views; white is empty.
    normals: outward, world axes x, y, z as red, green, blue, 0.5 n + 0.5; white is empty.
    """
    check(names)
    out = scene.render_view(cameras, size, normals="normals" in names)
    return {name: picture(out, name, cameras.to(out.rgb.device).distance) for name in names}


def picture(out: Views, name: str, distance: Tensor) -> Tensor:
    """One layer of a render as pictures (B, 3, H, W); distance (B,) of the cameras, scene units."""
    if name == "rgb":
        return out.rgb
    if name == "opacity":
        return out.opacity.expand(-1, 3, -1, -1)
    if name == "depth":
        behind = out.depth[:, 0] - distance[:, None, None]  # the middle of the scene: 0
        shown = coloured((0.5 - behind / (2 * REACH)).clamp(0, 1))
    else:
        assert name == "normals" and out.normal is not None, name
        shown = 0.5 * F.normalize(out.normal, dim=1) + 0.5
    return torch.lerp(torch.ones_like(shown), shown, out.opacity)
