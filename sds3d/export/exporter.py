"""The export of a scene for other programs: surface, colours, files, and a check of each file against the scene.

In a file the mesh stands on the ground, with the size and the up axis that programs expect of the format
(``model.STANDS``). A GLB is one metre high, with +y up and its front at +z, as in glTF and in ``cameras.py``. The
report holds what undoes this: world = file / scale + origin, after rotating (x, y, z) to (x, z, -y) if up is z. After a
file is written, and before it gets its final name, it is read back, rendered (raster.py) and compared with the scene's
renders, from views that did not choose the surface:

    IoU   of silhouettes (opacity above 1/2), mean over the views
    PSNR  of the pictures on white, mean over the views; also over only the pixels that either of the two covers
    depth    mean difference of the distances from the camera inside both silhouettes, in scene units
    normals  mean cosine between the file's and the scene's normals, where the file covers a pixel of opacity above 0.9

Silhouettes and colours alone cannot see a dent, a lid or a hole through which the inside shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sds3d.cameras import Cameras
from sds3d.export import formats, mesh, raster, texture
from sds3d.export.model import Model, Placement, Stand, stand
from sds3d.export.settings import MeshConfig
from sds3d.export.source import Seen, Source, Tell, checking_views, silent

IOU, PSNR = 0.97, 22.0  # a file below either of them gets a warning
DEPTH, NORMALS = 0.03, 0.85  # and so does one whose depths differ by more, or normals agree less
CLEAR = 0.9  # opacity; below it, a pixel's normals are those of several surfaces
BEST_PSNR = 60.0  # dB, the largest value; equal pictures have an infinite PSNR


@dataclass
class Export:
    """The export of one scene to files. Surface and colours are computed once and used for every format.

    Args:
        source: the scene.
        settings: settings of the surface and of its colours.
        card: values that a GLB stores beside the report: prompt, method ...
        unlit: whether the colours contain light already.
        up, height: axis and height of the mesh in files; None is the format's default, see ``model.stand``.
        tell: a progress callback, see ``source.Tell``.

    Attributes:
        seconds: time spent so far, by part.
        reports: reports of the files written so far.
    """

    source: Source
    settings: MeshConfig = MeshConfig()
    card: dict[str, Any] = field(default_factory=dict)
    unlit: bool = True
    tell: Tell = silent
    up: str | None = None
    height: float | None = None
    seconds: dict[str, float] = field(default_factory=dict, init=False)
    reports: dict[Path, dict[str, Any]] = field(default_factory=dict, init=False)
    _made: dict[Any, Any] = field(default_factory=dict, init=False)

    def skin(self) -> mesh.Skin:
        """Return the surface. Raise ValueError if the scene has none."""
        return self._once("surface", lambda: mesh.extract(self.source, self.settings, self.tell))

    def model(self, colours: str) -> Model:
        """Return the surface with a texture or with vertex colours, in world coordinates."""
        skin = self.skin()
        if colours == "vertex":
            return self._once("vertex colours", lambda: texture.with_vertex_colours(skin, self.source, self.tell))
        return self._once("texture", lambda: texture.with_texture(skin, self.source, self.settings.texture, self.tell))

    def report(self, stands: Stand) -> dict[str, Any]:
        """Return the report on the surface and its placement in a file, as values for JSON."""
        skin = self.skin()
        shape = formats.to_trimesh(Model(skin.vertices, skin.faces, mesh.normals(skin.vertices, skin.faces)))
        place = Placement.standing(skin.vertices, stands)
        return {
            "vertices": len(skin.vertices),
            "faces": len(skin.faces),
            "watertight": bool(shape.is_watertight),
            "components": int(shape.body_count),
            "level": skin.level,
            "level_iou": skin.level_iou,
            "scale": place.scale,
            "origin": list(place.origin),
            "up": stands.up,
            "unit": stands.unit,
        }

    def write(self, path: Path) -> dict[str, Any]:
        """Write one file atomically and check it; the suffix chooses the format.

        Returns:
            the report, with the file's iou, psnr and psnr_covered (None for STL, which has no colours).

        Raises:
            ValueError: the scene is empty, the suffix is unknown, or the file cannot be written.
        """
        suffix = path.suffix.lower()
        stands = stand(suffix, self.up, self.height)
        model = self.model("vertex" if suffix in (".ply", ".stl") else self.settings.colours)
        place = Placement.standing(self.skin().vertices, stands)
        report = self.report(stands)

        def check(written: Path) -> dict[str, Any]:
            with self._timed("check"):
                report.update(self._compare(place.to_world(formats.read(written)), coloured=suffix != ".stl"))
            return {**self.card, "mesh": report}

        with self._timed("files"):
            formats.write(place.to_file(model), path, check, self.unlit)
        self.reports[path] = report
        return report

    def lines(self) -> list[str]:
        """Return the summary for a user: a line for each file, warnings, and the seconds of each part."""
        if not self.reports:
            return []
        took = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return [
            *(_summary(path, report) for path, report in self.reports.items()),
            *(f"warning: {text}" for text in self.shortfalls()),
            f"seconds: {took}; in all {sum(self.seconds.values()):.1f}",
        ]

    def shortfalls(self) -> list[str]:
        """Return a sentence for every file that differs too much from its scene."""
        return [
            f"{path} differs from its scene: {_summary(path, report)}, where IoU {IOU}, PSNR {PSNR:g} dB, a depth error of at most {DEPTH} and normals of {NORMALS} "
            "are usual; a higher resolution may help, or a scene with a clearer surface"
            for path, report in self.reports.items()
            if _falls_short(report)
        ]

    def whole(self) -> dict[str, Any]:
        """Return the card, the report of the first file, and the placement and the check's results of each file."""
        first = next(iter(self.reports.values()))
        own = ("iou", "psnr", "psnr_covered", "depth", "normals", "scale", "origin", "up", "unit")
        checks = {p.name: {k: r[k] for k in own} for p, r in self.reports.items()}
        return {**self.card, "mesh": first, "files": checks}

    def _compare(self, model: Model, coloured: bool) -> dict[str, Any]:
        """Return iou, psnr, psnr_covered, depth and normals of a model that was read back, compared with the scene."""
        self.tell("check", 0.0)
        cameras = checking_views()
        seen = self._once("views", lambda: self._seen(cameras))
        self.tell("check", 0.7)
        ours, coverage = raster.render(model, cameras, self.source.pixels)
        self.tell("check", 1.0)
        a, b = coverage >= 0.5, seen.opacity >= 0.5
        both, either = (a & b).flatten(1).sum(1), (a | b).flatten(1).sum(1)
        scores = {"iou": float((both / either.clamp(min=1)).mean()), "psnr": None, "psnr_covered": None}
        if coloured:
            scores["psnr"] = psnr(ours, seen.rgb, torch.ones_like(a))
            scores["psnr_covered"] = psnr(ours, seen.rgb, a | b)
        return scores | shape_scores(*raster.surface(model, cameras, self.source.pixels), seen)

    def _seen(self, cameras: Cameras) -> Seen:
        """Render the scene for the check, on the CPU."""
        shape = self.source.shape
        found = Seen(*self.source.view(cameras, self.source.pixels)) if shape is None else shape(cameras, self.source.pixels)
        return Seen(*(None if image is None else image.float().cpu() for image in found))

    def _once(self, part: str, make: Callable[[], Any]) -> Any:
        if part not in self._made:
            with self._timed(part):
                self._made[part] = make()
        return self._made[part]

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Add the block's seconds to a part, without those of nested parts."""
        begun, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inner = sum(self.seconds.values()) - before
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begun - inner


def psnr(ours: Tensor, true: Tensor, where: Tensor) -> float:
    """Return the mean PSNR in dB of images (B, 3, H, W) in [0, 1] over the pixels of a mask (B, 1, H, W)."""
    squared = ((ours.clamp(0, 1) - true).double() ** 2 * where).flatten(1).sum(1)
    error = squared / (3 * where.flatten(1).sum(1)).clamp(min=1)
    return float((-10 * torch.log10(error.clamp(min=10 ** (-BEST_PSNR / 10)))).mean())


def shape_scores(distance: Tensor, normal: Tensor, seen: Seen) -> dict[str, float | None]:
    """Return the depth and normals scores of a mesh; None for what the scene does not give, or where nothing is seen.

    Args:
        distance, normal: (B, 1, H, W) and (B, 3, H, W), of `raster.surface`.
        seen: the scene's views.
    """
    scores: dict[str, float | None] = {"depth": None, "normals": None}
    inside = (distance > 0) & (seen.opacity >= 0.5)
    if seen.depth is not None and inside.any():
        scores["depth"] = float((distance - seen.depth)[inside].abs().double().mean())
    clear = inside & (seen.opacity > CLEAR)
    if seen.normal is not None and clear.any():
        cosine = torch.cosine_similarity(normal, seen.normal, dim=1)[:, None]
        scores["normals"] = float(cosine[clear].double().mean())
    return scores


def _falls_short(report: dict[str, Any]) -> bool:
    """Return whether one of a report's scores is known and beyond its bound."""
    least = {"iou": IOU, "psnr": PSNR, "normals": NORMALS}
    known = {key: report[key] for key in (*least, "depth") if report[key] is not None}
    return known.get("depth", 0.0) > DEPTH or any(known.get(key, bound) < bound for key, bound in least.items())


def _summary(path: Path, report: dict[str, Any]) -> str:
    """Return a file's report as one line."""
    pieces = report["components"]
    scores = {"iou": "IoU {:.3f}", "psnr": "PSNR {:.1f} dB", "depth": "depth error {:.3f}", "normals": "normals {:.3f}"}
    return (
        f"{path.name}: {report['faces']} faces, level {report['level']:.3g}, "
        f"{'watertight' if report['watertight'] else 'not watertight'}, {pieces} piece{'s' * (pieces != 1)}, "
        + ", ".join(text.format(report[key]) for key, text in scores.items() if report[key] is not None)
    )
