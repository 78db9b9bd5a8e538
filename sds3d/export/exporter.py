"""The export of a scene for other programs: surface, colours, files, and a check of each file against the scene.

In a file the mesh stands on the ground, with the size and the up axis that programs expect of the format
(``model.STANDS``). A GLB is one metre high, with +y up and its front at +z, as in glTF and in ``cameras.py``. The
report holds what undoes this: world = file / scale + origin, after rotating (x, y, z) to (x, z, -y) if up is z. After a
file is written, and before it gets its final name, it is read back, rendered (raster.py) and compared with the scene's
renders, from views that did not choose the surface (scores.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sds3d.cameras import Cameras
from sds3d.export import formats, mesh, raster, scores, texture
from sds3d.export.creases import with_creases
from sds3d.export.model import Model, Placement, Stand, stand
from sds3d.export.settings import MeshConfig
from sds3d.export.source import Seen, Source, Tell, checking_views, silent


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
            the report, with the file's scores (scores.py); STL has no colours, and None for their scores.

        Raises:
            ValueError: the scene is empty, the suffix is unknown, or the file cannot be written.
        """
        suffix = path.suffix.lower()
        stands = stand(suffix, self.up, self.height)
        plain = suffix in (".ply", ".stl")
        model = self.model("vertex" if plain else self.settings.colours)
        if not plain:  # these two keep one closed surface, for programs that print or sculpt it
            model = with_creases(model)
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
        beyond = {path: scores.beyond_bounds(report) for path, report in self.reports.items()}
        advice = "a higher resolution may help, or a scene with a clearer surface"
        return [f"{path} differs from its scene: {', '.join(what)}; {advice}" for path, what in beyond.items() if what]

    def whole(self) -> dict[str, Any]:
        """Return the card, the report of the first file, and the placement and the check's results of each file."""
        first = next(iter(self.reports.values()))
        own = ("psnr_covered", *scores.WORDS, "scale", "origin", "up", "unit")
        checks = {p.name: {k: r[k] for k in own} for p, r in self.reports.items()}
        return {**self.card, "mesh": first, "files": checks}

    def _compare(self, model: Model, coloured: bool) -> dict[str, Any]:
        """Return the scores of a model that was read back, compared with the scene."""
        self.tell("check", 0.0)
        cameras = checking_views()
        seen = self._once("views", lambda: self._seen(cameras))
        self.tell("check", 0.7)
        rgb, coverage = raster.render(model, cameras, self.source.pixels)
        shape = raster.surface(model, cameras, self.source.pixels)
        self.tell("check", 1.0)
        return scores.picture_scores(rgb if coloured else None, coverage, seen) | scores.shape_scores(shape, seen)

    def _seen(self, cameras: Cameras) -> Seen:
        """Render the scene for the check, on the CPU."""
        shape, pixels = self.source.shape, self.source.pixels
        seen = Seen(*self.source.view(cameras, pixels)) if shape is None else shape(cameras, pixels)
        return seen.on_cpu()

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


def _summary(path: Path, report: dict[str, Any]) -> str:
    """Return a file's report as one line."""
    pieces = report["components"]
    return (
        f"{path.name}: {report['faces']} faces, level {report['level']:.3g}, "
        f"{'watertight' if report['watertight'] else 'not watertight'}, {pieces} piece{'s' * (pieces != 1)}, "
        f"{scores.in_words(report)}"
    )
