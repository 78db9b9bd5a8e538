"""A scene as an asset for other programs: surface, colours, files, and a check of each file against the scene.

A file stands on the ground, in the size and with the axis up that programs expect of its format (``model.STANDS``). A
GLB is one metre high, +y up and +z its front (glTF's axes, and the world's of ``cameras.py``). The report says how to
undo it: world = file / scale + origin, where up is z after turning (x, y, z) to (x, z, -y). After it is written, and
before it has its final name, each file is read back, rendered (raster.py) and compared with the scene's own pictures,
from views that had no part in choosing the surface:

    IoU   of silhouettes, opacity cut at 1/2, mean over the views
    PSNR  of the pictures on white, mean over the views; and the same over the pixels only that either one covers
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

from sds3d.export import formats, mesh, raster, texture
from sds3d.export.model import Model, Placement, Stand, stand
from sds3d.export.settings import MeshConfig
from sds3d.export.source import Source, Tell, checking_views, silent

IOU, PSNR = 0.97, 22.0  # a file below either is reported
BEST_PSNR = 60.0  # dB; equal pictures have no finite PSNR


@dataclass
class Export:
    """One scene's way into files; what is made once serves every format.

    Args:
        source: the scene.
        settings: how the mesh is made.
        card: what a GLB carries beside the report: prompt, method ...
        unlit: whether the colours hold light already.
        up, height: how files stand; None is as their format wants it, see ``model.stand``.
        tell: called with what is being done, and how far it is.

    Attributes:
        seconds: by part, of all that was done so far.
        reports: of the files written so far.
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
        """The surface. Raises ValueError where there is none."""
        return self._once("surface", lambda: mesh.extract(self.source, self.settings, self.tell))

    def model(self, colours: str) -> Model:
        """The surface with a texture or with vertex colours, in world coordinates."""
        skin = self.skin()
        if colours == "vertex":
            return self._once("vertex colours", lambda: texture.with_vertex_colours(skin, self.source, self.tell))
        return self._once("texture", lambda: texture.with_texture(skin, self.source, self.settings.texture, self.tell))

    def report(self, stands: Stand) -> dict[str, Any]:
        """Of the surface and its place in a file: plain values, the same whenever it is made again."""
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
        """Write one file, whole or not at all, and check it; the suffix chooses the format.

        Returns:
            the report, with the file's iou, psnr and psnr_covered (None for STL, which has no colours).

        Raises:
            ValueError: an empty scene, another suffix, or a place that cannot be written.
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
        """What to tell a user of all that was written: a line a file, warnings, seconds by part."""
        if not self.reports:
            return []
        took = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return [
            *(_summary(path, report) for path, report in self.reports.items()),
            *(f"warning: {text}" for text in self.shortfalls()),
            f"seconds: {took}; in all {sum(self.seconds.values()):.1f}",
        ]

    def shortfalls(self) -> list[str]:
        """A sentence for every file that does not look like its scene."""
        return [
            f"{path} differs from its scene: {_summary(path, report)}, where {IOU} and {PSNR:g} dB are usual; "
            "a higher resolution may help"
            for path, report in self.reports.items()
            if report["iou"] < IOU or (report["psnr"] is not None and report["psnr"] < PSNR)
        ]

    def whole(self) -> dict[str, Any]:
        """The card, the report of the first file written, and of each file its place and what its check found."""
        first = next(iter(self.reports.values()))
        own = ("iou", "psnr", "psnr_covered", "scale", "origin", "up", "unit")
        checks = {p.name: {k: r[k] for k in own} for p, r in self.reports.items()}
        return {**self.card, "mesh": first, "files": checks}

    def _compare(self, model: Model, coloured: bool) -> dict[str, Any]:
        """How a model that was read back looks beside the scene."""
        self.tell("check", 0.0)
        cameras = checking_views()
        pictures, opacity = self._once("views", lambda: _on_cpu(self.source.view(cameras, self.source.pixels)))
        self.tell("check", 0.7)
        ours, coverage = raster.render(model, cameras, self.source.pixels)
        self.tell("check", 1.0)
        a, b = coverage >= 0.5, opacity >= 0.5
        both, either = (a & b).flatten(1).sum(1), (a | b).flatten(1).sum(1)
        found = {"iou": float((both / either.clamp(min=1)).mean()), "psnr": None, "psnr_covered": None}
        if coloured:
            found["psnr"] = psnr(ours, pictures, torch.ones_like(a))
            found["psnr_covered"] = psnr(ours, pictures, a | b)
        return found

    def _once(self, part: str, make: Callable[[], Any]) -> Any:
        if part not in self._made:
            with self._timed(part):
                self._made[part] = make()
        return self._made[part]

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Add the block's seconds to a part, less those of parts inside it."""
        begun, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inner = sum(self.seconds.values()) - before
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - begun - inner


def psnr(ours: Tensor, true: Tensor, where: Tensor) -> float:
    """Mean PSNR in dB of images (B, 3, H, W) in [0, 1] over the pixels of a mask (B, 1, H, W)."""
    squared = ((ours.clamp(0, 1) - true).double() ** 2 * where).flatten(1).sum(1)
    error = squared / (3 * where.flatten(1).sum(1)).clamp(min=1)
    return float((-10 * torch.log10(error.clamp(min=10 ** (-BEST_PSNR / 10)))).mean())


def _summary(path: Path, report: dict[str, Any]) -> str:
    """A file's report in one line."""
    pieces, colours = report["components"], report["psnr"]
    return (
        f"{path.name}: {report['faces']} faces, level {report['level']:.3g}, "
        f"{'watertight' if report['watertight'] else 'not watertight'}, {pieces} piece{'s' * (pieces != 1)}, "
        f"IoU {report['iou']:.3f}" + ("" if colours is None else f", PSNR {colours:.1f} dB")
    )


def _on_cpu(images: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return images[0].float().cpu(), images[1].float().cpu()
