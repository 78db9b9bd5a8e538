"""Line charts as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sds3d.files import replacing


def chart(lines: Mapping[str, tuple[Tensor, Tensor]], path: str | Path, x: str, y: str) -> Path:
    """Write lines (name -> values of x (N,), values of y (N,)) with a logarithmic y axis; the last is drawn on top.

    Raises:
        ValueError: the name does not end in .png, or the place cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for i, (name, (across, up)) in enumerate(lines.items()):
        last = i == len(lines) - 1
        axes.plot(across.cpu(), up.cpu(), label=name, linewidth=1.6 if last else 0.4, alpha=1 if last else 0.35)
    axes.set(xlabel=x, ylabel=y, yscale="log")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    with replacing(path, (".png",)) as temporary:
        figure.savefig(temporary)
    return Path(path)
