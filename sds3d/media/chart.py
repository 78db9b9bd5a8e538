"""Line charts as PNG files and as SVG for pages, and a colour map."""

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
    """Write a chart of lines with a logarithmic y axis. The last line is emphasised.

    Args:
        lines: name -> values of x (N,), values of y (N,).
        path: ends in .png.
        x, y: labels of the axes.
        points: emphasise all lines, mark each value, and use a logarithmic x axis, too.

    Raises:
        ValueError: the name does not end in .png, or the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for i, (name, (xs, ys)) in enumerate(lines.items()):
        strong = points or i == len(lines) - 1
        style = {"linewidth": 1.6 if strong else 0.4, "alpha": 1 if strong else 0.35, "marker": "o" if points else ""}
        axes.plot(xs.cpu(), ys.cpu(), label=name, **style)
    axes.set(xlabel=x, ylabel=y, yscale="log", xscale="log" if points else "linear")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    with replacing(path, (".png",)) as temporary:
        figure.savefig(temporary)
    return Path(path)


def coloured(values: Tensor) -> Tensor:
    """Map numbers (B, H, W) in [0, 1] to colours (B, 3, H, W) in [0, 1], with the colour map viridis."""
    from matplotlib import colormaps

    table = torch.from_numpy(colormaps["viridis"](range(256))[:, :3]).to(values)  # (256, 3)
    return table[(values * 255).round().long()].permute(0, 3, 1, 2)


MOST = 120  # most points of a curve; more rows are averaged in groups
INK = "#010203"  # a colour that is replaced by the page's text colour, which is light or dark

Curve = tuple[Sequence[float], Sequence[float]]  # x, y


def curves(rows: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return the curves of a run: caption -> SVG element. Figures that the rows do not have are left out.

    Args:
        rows: the rows of metrics.jsonl, with step, seconds and further figures.
    """
    keys = sorted({key for row in rows for key in row if re.search(r"g_norm/t[\d.]+-[\d.]+$", key)})
    by_t = {f"t {key.rpartition('/t')[2]}": averaged(rows, key) for key in keys}
    charts = {
        "opacity: mean of the training views": svg({"": averaged(rows, "opacity")}, "opacity", low=0),
        "size of the gradient on the images, by the noise level t": svg(by_t, "|gradient|", log=True),
        "throughput: steps a second": svg({"": rate(rows)}, "steps / s", low=0),
        "peak memory so far": svg({"": averaged(rows, "memory")}, "MB", low=0),
    }
    return {caption: element for caption, element in charts.items() if element}


def svg(lines: Mapping[str, Curve], y: str, log: bool = False, low: float | None = None) -> str:
    """Return curves over steps as an SVG element in the page's text colour; "" if there is nothing to draw.

    Args:
        lines: name -> x, y; several lines get a legend.
        y: label of the y axis.
        log: use a logarithmic y axis, without values that are not positive.
        low: lower end of the y axis.
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
    """Return a figure over steps, from the rows that have it, averaged in groups to at most MOST points."""
    points = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    size = max(1, math.ceil(len(points) / MOST))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [tuple(sum(column) / len(group) for column in zip(*group)) for group in groups]
    return [x for x, _ in means], [y for _, y in means]


def rate(rows: Sequence[Mapping[str, float]]) -> Curve:
    """Return steps per second over steps, in at most MOST intervals, without the first step, which compiles kernels."""
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
    index = [i for i, value in enumerate(y) if value > 0]
    return [x[i] for i in index], [y[i] for i in index]
