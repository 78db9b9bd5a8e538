"""Line charts as PNG files and as SVG for pages, and numbers as colours."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sds3d.runtime.files import replacing


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


MOST = 120  # points a curve of a page has: more rows are averaged
INK = "#010203"  # drawn in this colour, which becomes the page's own, light or dark

Curve = tuple[Sequence[float], Sequence[float]]  # x, y


def curves(rows: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """The curves of a run as SVG to put into a page, by caption; figures that the rows lack are left out.

    Args:
        rows: of metrics.jsonl: step, seconds, and whatever else was measured.
    """
    parts = sorted({key for row in rows for key in row if re.search(r"g_norm/t[\d.]+-[\d.]+$", key)})
    by_t = {f"t {key.rpartition('/t')[2]}": averaged(rows, key) for key in parts}
    found = {
        "opacity: mean of the training views": svg({"": averaged(rows, "opacity")}, "opacity", low=0),
        "size of the gradient on the images, by the noise level t": svg(by_t, "|gradient|", log=True),
        "throughput: steps a second": svg({"": rate(rows)}, "steps / s", low=0),
        "peak memory so far": svg({"": averaged(rows, "memory")}, "MB", low=0),
    }
    return {caption: drawn for caption, drawn in found.items() if drawn}


def svg(lines: Mapping[str, Curve], y: str, log: bool = False, low: float | None = None) -> str:
    """Curves over steps as an SVG element with the page's own text colour; "" where there is nothing to draw.

    Args:
        lines: name -> x, y; a legend where there are several.
        y: label of the y axis.
        log: logarithmic y axis; what is not positive is left out.
        low: where the y axis begins.
    """
    if log:
        lines = {name: _positive(curve) for name, curve in lines.items()}
    lines = {name: curve for name, curve in lines.items() if len(curve[0]) > 0}
    if not lines:
        return ""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "text.color": INK, "axes.edgecolor": INK}):
        figure = Figure(figsize=(5.6, 2.7))
        figure.subplots_adjust(0.135, 0.17, 0.985, 0.9 if len(lines) > 1 else 0.97)
        axes = figure.add_subplot()
        for i, (name, curve) in enumerate(lines.items()):
            mark = "o" if len(curve[0]) == 1 else ""
            axes.plot(*curve, label=name or None, color=f"C{i}", linewidth=1.5, marker=mark, markersize=4)
        axes.set(xlabel="step", yscale="log" if log else "linear", facecolor="none")
        axes.set_ylabel(y)
        if low is not None:
            axes.set_ylim(bottom=low)
        axes.tick_params(which="both", colors=INK, labelsize=8)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color=INK, alpha=0.12)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8, ncols=len(lines), loc="lower left", bbox_to_anchor=(0, 0.97))
        text = io.StringIO()
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return text.getvalue()[text.getvalue().index("<svg") :].replace(INK, "currentColor")


def averaged(rows: Sequence[Mapping[str, float]], key: str) -> Curve:
    """A figure over steps, where it was measured; averaged in groups to MOST points."""
    points = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    size = max(1, math.ceil(len(points) / MOST))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [tuple(sum(column) / len(group) for column in zip(*group)) for group in groups]
    return [x for x, _ in means], [y for _, y in means]


def rate(rows: Sequence[Mapping[str, float]]) -> Curve:
    """Steps a second over steps, in at most MOST stretches; the first step, in which kernels are made, is left out."""
    size = max(1, math.ceil(len(rows) / MOST))
    ends = [row for row in rows if "step" in row and "seconds" in row][::size]
    pairs = [(a, b) for a, b in zip(ends, ends[1:]) if b["seconds"] > a["seconds"]]
    return (
        [(a["step"] + b["step"]) / 2 for a, b in pairs],
        [(b["step"] - a["step"]) / (b["seconds"] - a["seconds"]) for a, b in pairs],
    )


def _positive(curve: Curve) -> Curve:
    """The part of a curve that a logarithmic axis can show."""
    x, y = curve
    kept = [i for i, up in enumerate(y) if up > 0]
    return [x[i] for i in kept], [y[i] for i in kept]
