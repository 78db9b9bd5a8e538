"""An asset: the scene of a run, which can be rendered, exported and evaluated."""

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
from sds3d.export.exporter import Export
from sds3d.export.model import stand
from sds3d.export.source import Seen, Source, Tell, silent
from sds3d.media import sheet, video
from sds3d.runs import report, scene_parts
from sds3d.runs.folder import Run
from sds3d.runtime.distributed import Processes
from sds3d.runtime.files import user_path
from sds3d.runtime.torch_modes import require_own_process, training
from sds3d.students.base import Particles, outsized
from sds3d.students.representation import Scene

if TYPE_CHECKING:
    import PIL.Image
    import trimesh

    from sds3d.evaluate.truth import Scores

DOUBT_SIZE = 16  # pixels a side of the views that `Asset.doubt` renders
EMPTY, FULL = 1e-3, 0.95  # an object covers more than EMPTY and less than FULL of these views
COMPARED = ("iou", "psnr", "chamfer", "fscore", "fscore_fine", "normals", "depth_error", "topology")  # by sds3d compare
EVAL_SIZE = 64  # pixels a side of the views that are scored
ALBEDO_ROWS = "truth, without light", "ours, without light"  # labels in eval.png
FORMATS = (*formats.FORMATS, ".mp4", ".png")


class Asset:
    """The scene of a run folder, or one of its scenes if it trained several particles.

    Attributes:
        path (Path): the run folder.
        config (Config): the run's settings.
        student (Scene | Particles): the run's student: the scene, or all particles.
        particle (int): the index of this asset's scene among the particles.
        scene (Scene): this asset's scene.
    """

    PAGE: ClassVar[report.PageFacts] = report.PageFacts(
        pictures={"The true shape and ours, without and under a light": "eval.png"},
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
        """Load the asset of a run folder from its last checkpoint, onto any device and backend.

        Raises:
            ValueError: the run or its checkpoint is missing or damaged, the checkpoint does not fit the config, or the
                run is of another kind.

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
        """The assets of this run, one per particle."""
        count = len(self.student.students) if isinstance(self.student, Particles) else 1
        return [Asset(self.run, self.config, self.student, i) for i in range(count)]

    @property
    def kernels(self) -> str:
        """The device and the kernels that render the scene, for display."""
        return f"{self.scene.device}, {self.scene.kernels}"

    @property
    def light_baked(self) -> bool:
        """Whether the colours hold the light that the teacher drew: without shading, all that are no albedo do."""
        return self.config.render.shading == "albedo" and self.config.domains.colours == "colours"

    def picture(self) -> Tensor:
        """Return four views for a progress picture, or one per particle, (B, 3, H, W) in [0, 1]."""
        cameras = orbit(4 if self.config.particles == 1 else 1, self.config.export.elevation)
        return torch.cat([asset.views(cameras) for asset in self.particles])

    def views(self, cameras: Cameras | Poses, resolution: int | None = None) -> Tensor:
        """Render images (B, 3, H, W) in [0, 1] without gradients; H = W is the training resolution by default."""
        with training():
            return self.scene.render_view(cameras, resolution).rgb

    def pictures(self, count: int, resolution: int) -> Tensor:
        """Render ``count`` views from all sides, (count, 3, resolution, resolution) in [0, 1]."""
        return self.views(orbit(count), resolution)

    def against_truth(self) -> dict[str, float | None]:
        """Compare with the toybox's object of the prompt; see `evaluate`. Raises ValueError if there is none."""
        scores = self.evaluate()
        return {name: None if (value := getattr(scores, name)) is None else float(value) for name in COMPARED}

    def render(
        self,
        azimuth: float = 0.0,
        elevation: float = 15.0,
        resolution: int = 256,
        distance: float = 3.0,
        fov: float = 40.0,
    ) -> PIL.Image.Image:
        """Render one view. Azimuth 0 degrees is the front, 90 the object's left (+x).

        Raises:
            ValueError: the elevation is outside [-90, 90], or the size is impossible.
        """
        from PIL import Image

        if not -90 <= elevation <= 90:
            raise ValueError(f"elevation is {elevation}; give degrees from -90 to 90")
        camera = Cameras(*(torch.tensor([float(v)]) for v in (azimuth, elevation, distance, fov)))
        return Image.fromarray(sheet.to_bytes(self.views(camera, resolution))[0])

    def exporter(
        self, tell: Tell = silent, up: str | None = None, height: float | None = None, **changed: Any
    ) -> Export:
        """Return an exporter that writes this scene into mesh files. Several formats share one mesh.

        Args:
            tell: called with the name of the present task, and the fraction of it that is done, 0 to 1.
            up, height: the orientation and height of the mesh; see `export`.
            changed: settings of ``export.mesh`` that replace the config's, as ``resolution=256``.

        Raises:
            ValueError: a setting is out of its range.
        """
        require_own_process()
        config, settings = self.config, dataclasses.replace(self.config.export.mesh, **changed)
        card = {
            "prompt": config.prompt,
            "method": configs.name_of(config.method),
            "teacher": config.teacher.name,
            "seed": config.seed,
            "particle": self.particle,
            "version": version("sds3d"),
            "light_baked": self.light_baked,
        }
        pixels = min(config.export.size, Source.pixels)
        scene = self.scene
        source = Source(
            scene.density,
            scene.colours,
            self._on_white,
            self._shape,
            scene.device,
            scene.detail,
            scene.surface_density,
            pixels,
        )
        return Export(source, settings, card, self.light_baked, tell, up, height)

    def _on_white(self, cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
        """Render images (B, 3, H, H) on white, and opacity (B, 1, H, H)."""
        out = self.scene.render_view(cameras, size, background="#ffffff")
        return out.rgb, out.opacity

    def _shape(self, cameras: Cameras, size: int) -> Seen:
        """Render images on white, opacity, depths and normals."""
        out = self.scene.render_view(cameras, size, normals=True, background="#ffffff")
        return Seen(out.rgb, out.opacity, out.depth, out.normal)

    def mesh(self, resolution: int | None = None) -> trimesh.Trimesh:
        """Extract the surface with vertex colours, in world coordinates: y up, front +z.

        Args:
            resolution: voxels along each side of the box; the config's by default.

        Raises:
            ValueError: nothing is dense enough to have a surface.
        """
        changed: dict[str, Any] = {} if resolution is None else {"resolution": resolution}
        return formats.to_trimesh(self.exporter(**changed).model("vertex"))

    def export(self, path: str | Path, up: str | None = None, height: float | None = None) -> Path:
        """Write .glb, .obj, .ply, .stl (mesh), .mp4 (turntable) or .png (eight views), chosen by the suffix.

        A mesh stands on the ground. Each mesh file is compared with the scene, and a warning says if it looks
        different.

        Args:
            path: the file to write.
            up: for a mesh, the axis that points up, "y" or "z"; by default y in GLB and OBJ, z in PLY and STL.
            height: for a mesh, its height: in millimetres for STL (100 by default), in metres otherwise (1).

        Raises:
            ValueError: the suffix, the axis or the height is not supported, the scene is empty, or the file cannot be
                written.
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
        else:  # outside the run folder there is no mesh.json
            exporter.write(path)
        for text in exporter.shortfalls():
            warnings.warn(text, stacklevel=2)
        return path

    def write_mesh(self, exporter: Export, path: Path) -> dict[str, Any]:
        """Write one mesh file, and mesh.json beside it, which holds the GLB's extras and the check of each file.

        Returns:
            The report of `Export.write`.
        """
        report = exporter.write(path)
        self.run.write_text(path.with_name(self.file("mesh.json").name), json.dumps(exporter.whole(), indent=1) + "\n")
        return report

    def finish(self) -> Iterator[Path]:
        """Write preview.png, turntable.mp4 and mesh.glb of each particle into the run folder, then index.html.

        If training seems to have diverged, warns and says so on the page.

        Yields:
            Each path once it is written.

        Raises:
            ValueError: the disk is full, or there is no surface. The files before stay, and the page shows them.
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
        """Write the run's index.html. Raises ValueError; see `report.write_page`."""
        return report.write_page(self.run, self.PAGE, note)

    def doubt(self) -> str:
        """Return a sentence that says why training seems to have diverged, though its losses were finite; else "".

        The signs are weights that are far too large, and a scene that fills its views or covers almost nothing of
        them.
        """
        cameras = orbit(8, self.config.export.elevation)
        opacity = float(self.scene.render_view(cameras, DOUBT_SIZE).opacity.mean())
        problem = outsized(self.scene)
        if not problem and EMPTY < opacity < FULL:
            return ""
        problem = problem or "Training did not find an object: lower optim.lr or method.scale"
        return f"{self.path} covers {100 * opacity:.3g} % of its views. {problem}"

    def file(self, name: str) -> Path:
        """Return the path of a file of this asset. Particles after the first add their number, as in mesh-2.glb."""
        stem, dot, suffix = name.partition(".")
        return self.path / (f"{stem}-{self.particle + 1}{dot}{suffix}" if self.particle else name)

    def evaluate(self) -> Scores:
        """Compare with the toybox's object of the prompt: views from 24 unseen cameras, and the mesh with its surface.

        Colours without light (see `light_baked`) are compared with the true albedo, and under the toybox's light with
        its lit views.

        Writes eval.png, eval.json and the run's page. The picture has the views, then the mesh under a light that the
        scene's colours know nothing of: in clay beside the truth, and in its colours.

        Raises:
            ValueError: the prompt is not the toybox's.
        """
        from sds3d.data import toybox
        from sds3d.data.tracing import relit
        from sds3d.evaluate import truth

        toy = toybox.parse(self.config.prompt)
        behind = toy.background or "white"
        try:
            mesh = self.mesh()
        except ValueError:  # there is no surface, so the scores of the mesh are None
            mesh = None

        def as_it_is(cameras: Cameras) -> tuple[Tensor, Tensor]:
            out = self.scene.render_view(cameras, EVAL_SIZE, background=behind)
            return out.rgb, out.opacity

        def under_light(cameras: Cameras) -> tuple[Tensor, Tensor]:
            out = self.scene.render_view(cameras, EVAL_SIZE, normals=True, background=behind)
            assert out.normal is not None
            background = toybox.background_colour(toy.background).to(out.rgb)
            return relit(out.rgb, out.opacity, out.normal, background), out.opacity

        baked = self.light_baked
        scores = truth.evaluate(as_it_is if baked else under_light, mesh, toy, albedo=None if baked else as_it_is)
        below = {} if scores.albedo is None else dict(zip(ALBEDO_ROWS, (views[:8] for views in scores.albedo)))
        below |= {
            "truth, in clay under a light": scores.true_clay,
            "our mesh, in clay under a light": scores.clay,
            "our mesh, in its colours under the same light": scores.lit,
        }
        sheet.side_by_side(scores.truth, scores.ours, self.file("eval.png"), below=below)
        self.run.write_text(self.file("eval.json"), json.dumps(scores.numbers(), indent=1) + "\n")
        self.write_page()
        return scores
