"""Line charts, and numbers as colours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sds3d.files import replacing


def chart(lines: Mapping[str, tuple[Tensor, Tensor]], path: str | Path, x: str, y: str, points: bool = False) -> Path:
    """Write lines (name -> values of x (N,), values of y (N,)) with a logarithmic y axis; the last is drawn on top.

    Args:
        points: draw all lines alike, with a mark at each value, and x logarithmic, too.

    Raises:
        ValueError: the name does not end in .png, or the place cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for i, (name, (across, up)) in enumerate(lines.items()):
        strong = points or i == len(lines) - 1
        look = {"linewidth": 1.6 if strong else 0.4, "alpha": 1 if strong else 0.35, "marker": "o" if points else ""}
        axes.plot(across.cpu(), up.cpu(), label=name, **look)
    axes.set(xlabel=x, ylabel=y, yscale="log", xscale="log" if points else "linear")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    with replacing(path, (".png",)) as temporary:
        figure.savefig(temporary)
    return Path(path)


def coloured(values: Tensor) -> Tensor:
    """Numbers (B, H, W) in [0, 1] as colours (B, 3, H, W) in [0, 1] that grow brighter evenly (viridis)."""
    from matplotlib import colormaps

    table = torch.from_numpy(colormaps["viridis"](range(256))[:, :3]).to(values)  # (256, 3)
    return table[(values * 255).round().long()].permute(0, 3, 1, 2)
