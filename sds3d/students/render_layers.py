"""Pictures of a scene's colours, opacity, depth or normals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sds3d.cameras import Cameras
from sds3d.media.chart import coloured
from sds3d.students.representation import Scene, Views

LAYERS = ("rgb", "opacity", "depth", "normals")
DEPTH_RANGE = 1.0  # shown on either side of the scene's centre, in scene units; depths beyond are clamped


def check(names: Sequence[str]) -> None:
    """Raise ValueError if a layer is unknown, or if there is no layer."""
    for name in names or [""]:
        if name not in LAYERS:
            raise ValueError(f"there is no layer {name!r}; give one or more of {', '.join(LAYERS)}")


def layers(scene: Scene, cameras: Cameras, size: int, names: Sequence[str]) -> dict[str, Tensor]:
    """Return pictures (B, 3, size, size) in [0, 1] of each named layer, without gradient.

    opacity: black is empty, white is solid. depth: bright is near, dark is far, on one scale for all views; white is
    empty. normals: outward, world axes x, y, z as red, green, blue, 0.5 n + 0.5; white is empty.

    Raises:
        ValueError: see `check`.
    """
    check(names)
    out = scene.render_view(cameras, size, normals="normals" in names)
    return {name: picture(out, name, cameras.to(out.rgb.device).distance) for name in names}


def picture(out: Views, name: str, distance: Tensor) -> Tensor:
    """Return one layer of a render as pictures (B, 3, H, W), given the cameras' distance (B,) in scene units."""
    if name == "rgb":
        return out.rgb
    if name == "opacity":
        return out.opacity.expand(-1, 3, -1, -1)
    if name == "depth":
        behind = out.depth[:, 0] - distance[:, None, None]  # 0 at the centre of the scene
        shown = coloured((0.5 - behind / (2 * DEPTH_RANGE)).clamp(0, 1))
    else:
        assert name == "normals" and out.normal is not None, name
        shown = 0.5 * F.normalize(out.normal, dim=1) + 0.5
    return torch.lerp(torch.ones_like(shown), shown, out.opacity)
