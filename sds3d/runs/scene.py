"""An asset: a run's scene, ready to be looked at and exported."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sds3d.cameras import Cameras, Poses, orbit
from sds3d.config import load as configs
from sds3d.config.load import Config
from sds3d.export import formats
from sds3d.export.model import stand
from sds3d.export.pipeline import Export
from sds3d.export.source import Source, Tell, silent
from sds3d.media import sheet, video
from sds3d.runs import report, scene_parts
from sds3d.runs.folder import Run
from sds3d.runtime.distributed import Processes
from sds3d.runtime.files import user_path
from sds3d.runtime.modes import require_own_process, training
from sds3d.students.base import Particles, outsized
from sds3d.students.representation import Scene

if TYPE_CHECKING:
    import PIL.Image
    import trimesh

    from sds3d.evaluate.truth import Scores

DOUBT_SIZE = 16  # of the views that tell whether there is an object,
EMPTY, FULL = 1e-3, 0.95  # which then covers more of them than this, and less than that
EVAL_SIZE = 64  # pixels a side of the views that are scored
FORMATS = (*formats.FORMATS, ".mp4", ".png")


class Asset:
    """The scene of a run folder, or one of its scenes, where several particles shared a critic.

    Attributes:
        path (Path): the run folder.
        config (Config): everything that made it.
        student (Scene | Particles): what is trained: the scene, or all particles.
        particle (int): which of them this is.
        scene (Scene): it.
    """

    PAGE: ClassVar[report.PageFacts] = report.PageFacts(
        pictures={"The true shape and ours": "eval.png"},
        commands=(
            "sds3d export {run} --format glb,obj,ply",
            "sds3d render {run} --size 512 --what rgb,depth,normals",
            "sds3d eval {run}      # beside the true shape, where the toybox has one",
            "sds3d resume {run} steps={twice}",
        ),
        film_size=lambda config: config.export.size,
    )

    def __init__(self, run: Run, config: Config, student: Scene | Particles, particle: int = 0):
        self.run, self.config, self.student, self.particle = run, config, student, particle
        scene = student.students[particle] if isinstance(student, Particles) else student
        assert isinstance(scene, Scene), scene
        self.scene = scene

    @classmethod
    @training()
    def open(cls, path: str | Path, device: str = "auto", backend: str = "auto") -> Asset:
        """The asset of a run folder, as its last checkpoint has it, on any device and backend.

        Raises:
            ValueError: no such run, no checkpoint, a damaged one, one that does not fit its config, or a run that
                painted images.

        Examples:
            >>> asset = Asset.open("outputs/00001-a-red-mug")
            >>> asset.render(azimuth=30, resolution=64).size
            (64, 64)
        """
        run = Run.open(path)
        config = configs.of_run(run.config)
        if config.MAKES == "generator":
            raise ValueError(f"{run.path} trains a generator and is not finished; sds3d resume {run.path}")
        if config.MAKES != "scene":
            raise ValueError(f"{run.path} holds {config.MAKES}, not a scene; look at its image.png")
        config = configs.changed(config, {"device": device, "backend": backend})
        student = scene_parts.build_student(config, None, Processes())
        run.load_student(student)
        return cls(run, config, student)

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.run.path

    @property
    def particles(self) -> list[Asset]:
        """The assets of this run, one a particle."""
        count = len(self.student.students) if isinstance(self.student, Particles) else 1
        return [Asset(self.run, self.config, self.student, i) for i in range(count)]

    @property
    def kernels(self) -> str:
        """Where and with what it is rendered."""
        return f"{self.scene.device}, {self.scene.kernels}"

    def picture(self) -> Tensor:
        """Four views for a progress picture, or one a particle, (B, 3, H, W) in [0, 1]."""
        each = [orbit(4 if self.config.particles == 1 else 1, self.config.export.elevation)] * self.config.particles
        return torch.cat([asset.views(cameras) for asset, cameras in zip(self.particles, each, strict=True)])

    def views(self, cameras: Cameras | Poses, resolution: int | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], no gradient; H = W = the training resolution by default."""
        with training():
            return self.scene.render_view(cameras, resolution).rgb

    def pictures(self, count: int, resolution: int) -> Tensor:
        """As many views of it from all sides, (count, 3, resolution, resolution) in [0, 1]."""
        return self.views(orbit(count), resolution)

    def against_truth(self) -> dict[str, float | None]:
        """Figures against the toybox's object of its prompt. Raises ValueError where there is none."""
        scores = self.evaluate()
        return {"iou": scores.iou, "psnr": scores.psnr, "chamfer": scores.chamfer, "fscore": scores.fscore}

    def render(
        self,
        azimuth: float = 0.0,
        elevation: float = 15.0,
        resolution: int = 256,
        distance: float = 3.0,
        fov: float = 40.0,
    ) -> PIL.Image.Image:
        """One view as a picture. Azimuth 0 is the front, 90 the object's left (+x); degrees.

        Raises:
            ValueError: an elevation outside [-90, 90] or an impossible size.
        """
        from PIL import Image

        if not -90 <= elevation <= 90:
            raise ValueError(f"elevation is {elevation}; give degrees from -90 to 90")
        camera = Cameras(*(torch.tensor([float(v)]) for v in (azimuth, elevation, distance, fov)))
        return Image.fromarray(sheet.to_bytes(self.views(camera, resolution))[0])

    def exporter(
        self, tell: Tell = silent, up: str | None = None, height: float | None = None, **changed: Any
    ) -> Export:
        """What writes this scene into mesh files; several formats share what is made once.

        Args:
            tell: called with what is being done, and how far it is, 0 to 1.
            up, height: how files stand, see ``export``.
            changed: settings of ``export.mesh`` other than the config's, as ``resolution=256``.

        Raises:
            ValueError: a setting is out of its range.
        """
        require_own_process()
        config, settings = self.config, dataclasses.replace(self.config.export.mesh, **changed)
        lit = config.render.shading == "albedo"  # then the scene's colours hold what light the teacher painted
        card = {
            "prompt": config.prompt,
            "method": configs.name_of(config.method),
            "teacher": config.teacher.name,
            "seed": config.seed,
            "particle": self.particle,
            "version": version("sds3d"),
            "light_baked": lit,
        }
        pixels = min(config.export.size, Source.pixels)
        scene = self.scene
        source = Source(scene.density, scene.colours, self._on_white, scene.device, scene.detail, pixels)
        return Export(source, settings, card, lit, tell, up, height)

    def _on_white(self, cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, H) on white, and opacity (B, 1, H, H)."""
        out = self.scene.render_view(cameras, size, background="#ffffff")
        return out.rgb, out.opacity

    def mesh(self, resolution: int | None = None) -> trimesh.Trimesh:
        """The surface with vertex colours, world coordinates: y up, front +z.

        Args:
            resolution: voxels along each side of the box; the config's by default.

        Raises:
            ValueError: nothing is dense enough to have a surface.
        """
        changed: dict[str, Any] = {} if resolution is None else {"resolution": resolution}
        return formats.to_trimesh(self.exporter(**changed).model("vertex"))

    def export(self, path: str | Path, up: str | None = None, height: float | None = None) -> Path:
        """Write .glb, .obj, .ply, .stl (mesh), .mp4 (turntable) or .png (eight views), chosen by the suffix.

        A mesh stands on the ground. Each is compared with the scene; a file that does not look like it comes with a
        warning.

        Args:
            path: where to.
            up: of a mesh, the axis that points up, "y" or "z"; by default y in GLB and OBJ, z in PLY and STL.
            height: of a mesh, in millimetres for STL (100 by default), in metres otherwise (1).

        Raises:
            ValueError: another suffix, axis or height than can be, an empty scene, or a place that cannot be written.
        """
        path, settings = user_path(path), self.config.export
        suffix = path.suffix.lower()
        if suffix not in FORMATS:
            raise ValueError(f"cannot export {path.name!r}: the name must end in {', '.join(FORMATS)}")
        if suffix == ".mp4":
            return video.turntable(
                lambda cameras: self.views(cameras, settings.size),
                path,
                frames=settings.frames,
                size=settings.size,
                elevation=settings.elevation,
            )
        if suffix == ".png":
            return sheet.preview(lambda cameras: self.views(cameras, settings.size), path, size=settings.size)
        stand(suffix, up, height)  # before the work
        exporter = self.exporter(up=up, height=height)
        if path.resolve().parent == self.path.resolve():
            self.write_mesh(exporter, path)
        else:  # a single file was asked for
            exporter.write(path)
        for text in exporter.shortfalls():
            warnings.warn(text, stacklevel=2)
        return path

    def write_mesh(self, exporter: Export, path: Path) -> dict[str, Any]:
        """Write one mesh file, and mesh.json beside it, with what the GLB's extras say and each file's check.

        Returns:
            the report of `Export.write`.
        """
        report = exporter.write(path)
        self.run.write_text(path.with_name(self.file("mesh.json").name), json.dumps(exporter.whole(), indent=1) + "\n")
        return report

    def finish(self) -> Iterator[Path]:
        """Write preview.png, turntable.mp4 and mesh.glb into the run folder, one after the other, for each particle;
        then index.html, the page of it all. Warns where training seems to have diverged, and the page says so.

        Raises:
            ValueError: the disk is full, or there is no surface; what came before it is there, and on the page.
        """
        doubts = [text for asset in self.particles if (text := asset.doubt())]
        for text in doubts:
            warnings.warn(text, stacklevel=2)
        with self.run.lock():
            try:
                for asset in self.particles:
                    for name in ("preview.png", "turntable.mp4", "mesh.glb"):
                        yield asset.export(asset.file(name))
            except ValueError as error:
                self.write_page(" ".join([*doubts, f"The run ended with an error: {error}"]))
                raise
            yield self.write_page(" ".join(doubts))

    def write_page(self, note: str = "") -> Path:
        """Write index.html, the run's page. Raises ValueError; see `report.write_page`."""
        return report.write_page(self.run, self.PAGE, note)

    def doubt(self) -> str:
        """What says that training diverged, though its figures stayed finite; "" where nothing does.

        Weights that have left all bounds; a scene that fills its box, where an object leaves most of every view free;
        and one that is nowhere.
        """
        cameras = orbit(8, self.config.export.elevation)
        opacity = float(self.scene.render_view(cameras, DOUBT_SIZE).opacity.mean())
        seen = f"covers {100 * opacity:.3g} % of its views"
        found = outsized(self.scene)
        if found or not EMPTY < opacity < FULL:
            found = f"{self.path} {seen}. {found or 'Training did not find an object: lower optim.lr or method.scale'}"
        return found

    def file(self, name: str) -> Path:
        """Where a file of this asset goes: particles after the first have a number, as in mesh-2.glb."""
        stem, dot, suffix = name.partition(".")
        return self.path / (f"{stem}-{self.particle + 1}{dot}{suffix}" if self.particle else name)

    def evaluate(self) -> Scores:
        """Compare with the toybox's own object of that prompt, from 24 unseen views; writes eval.png, eval.json
        and the run's page.

        Raises:
            ValueError: the prompt is not the toybox's.
        """
        from sds3d.data import toybox
        from sds3d.evaluate import truth

        toy = toybox.parse(self.config.prompt)
        try:
            mesh = self.mesh()
        except ValueError:  # no surface: the scores say so
            mesh = None

        def render(cameras: Cameras) -> tuple[Tensor, Tensor]:
            out = self.scene.render_view(cameras, EVAL_SIZE, background=toy.background or "white")
            return out.rgb, out.opacity

        scores = truth.evaluate(render, mesh, toy)
        sheet.side_by_side(scores.truth, scores.ours, self.file("eval.png"))
        self.run.write_text(self.file("eval.json"), json.dumps(scores.numbers(), indent=1) + "\n")
        self.write_page()
        return scores
