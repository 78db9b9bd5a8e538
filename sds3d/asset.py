"""An asset: a run's scene, ready to be looked at and exported; and how to make one or go on with one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sds3d import config as configs
from sds3d.cameras import Cameras, orbit
from sds3d.config import Config
from sds3d.export import mesh as meshes
from sds3d.export import sheet, video
from sds3d.runs import Run
from sds3d.scenes.student import SceneStudent
from sds3d.teachers.base import Teacher
from sds3d.train import Step, train

if TYPE_CHECKING:
    import PIL.Image
    import trimesh

    from sds3d.metrics.truth import Scores

EVAL_SIZE = 64  # pixels a side of the views that are scored
FORMATS = (*meshes.FORMATS, ".mp4", ".png")


class Asset:
    """The scene of a run folder.

    Attributes:
        path: the run folder.
        config: everything that made it.
    """

    def __init__(self, run: Run, config: Config, student: SceneStudent):
        self.run, self.config, self.student = run, config, student

    @classmethod
    def open(cls, path: str | Path, device: str = "auto", backend: str = "auto") -> Asset:
        """The asset of a run folder, as its last checkpoint has it, on any device and backend.

        Raises:
            ValueError: no such run, no checkpoint, a damaged one, or one that does not fit its config.
        """
        run = Run.open(path)
        config = configs.changed(_config_of(run), {"device": device, "backend": backend})
        state = run.load_checkpoint()
        student = configs.make_student(config)
        try:
            student.load_state_dict(state["student"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{run.checkpoint} does not fit {run.config}; was one of them edited?") from error
        return cls(run, config, student)

    @property
    def path(self) -> Path:
        return self.run.path

    def views(self, cameras: Cameras, resolution: int | None = None) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], no gradient; H = W = the training resolution by default."""
        return self.student.render_view(cameras, resolution).rgb

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

    def mesh(self, resolution: int | None = None) -> trimesh.Trimesh:
        """The surface with vertex colours, world coordinates: y up, front +z.

        Args:
            resolution: voxels along each side of the box; the config's by default.

        Raises:
            ValueError: nothing is dense enough to have a surface.
        """
        settings, student = self.config.export, self.student
        return meshes.extract(
            student.density,
            student.colours,
            resolution=settings.mesh_resolution if resolution is None else resolution,
            threshold=settings.threshold,
            keep=settings.keep,
            device=student.device,
        )

    def export(self, path: str | Path) -> Path:
        """Write .glb, .obj, .ply (mesh), .mp4 (turntable) or .png (eight views), chosen by the suffix.

        Raises:
            ValueError: another suffix, an empty scene, or a place that cannot be written.
        """
        path, settings = Path(path).expanduser(), self.config.export
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
        return meshes.save(self.mesh(), path)

    def finish(self) -> Iterator[Path]:
        """Write preview.png, turntable.mp4 and mesh.glb into the run folder, one after the other.

        Raises:
            ValueError: the disk is full, or there is no surface; what came before it is there.
        """
        for name in ("preview.png", "turntable.mp4", "mesh.glb"):
            yield self.export(self.path / name)

    def evaluate(self) -> Scores:
        """Compare with the toybox's own object of that prompt, from 24 unseen views; writes eval.png and eval.json.

        Raises:
            ValueError: the prompt is not the toybox's.
        """
        from sds3d.data import toybox
        from sds3d.metrics import truth

        toy = toybox.parse(self.config.prompt)
        try:
            mesh = self.mesh()
        except ValueError:  # no surface: the scores say so
            mesh = None

        def render(cameras: Cameras) -> tuple[Tensor, Tensor]:
            out = self.student.render_view(cameras, EVAL_SIZE, background=toy.background or "white")
            return out.rgb, out.opacity

        scores = truth.evaluate(render, mesh, toy)
        sheet.side_by_side(scores.truth, scores.ours, self.path / "eval.png")
        self.run.write_text(self.path / "eval.json", json.dumps(scores.numbers(), indent=1) + "\n")
        return scores


def start(config: Config) -> tuple[Asset, Iterator[Step]]:
    """A new run: its folder, and the loop, not yet begun. The folder is made once everything else is in order.

    Raises:
        ValueError: the prompt is not for this teacher, weights are missing, the folder cannot be written ...
    """
    teacher = configs.make_teacher(config)
    student = configs.make_student(config)
    run = Run.create(config.out, config.prompt, configs.to_yaml(config))
    asset = Asset(run, config, student)
    try:
        return asset, _steps(asset, teacher)
    except ValueError:
        run.discard()
        raise


def resume(path: str | Path, layer: Mapping[str, Any] | None = None) -> tuple[Asset, Iterator[Step]]:
    """A run, and the loop from its checkpoint on.

    Args:
        path: the run folder.
        layer: what may change: steps, device, backend, log, export.

    Raises:
        ValueError: no such run, a damaged checkpoint, more steps done than asked for ...
    """
    run = Run.open(path)
    config = configs.changed(_config_of(run), layer or {})
    teacher = configs.make_teacher(config)
    asset = Asset(run, config, configs.make_student(config))
    steps = _steps(asset, teacher, resume=True)
    if layer:
        run.write_text(run.config, configs.to_yaml(config))
    return asset, steps


def _config_of(run: Run) -> Config:
    """What a run was made with. Raises ValueError that names the file."""
    try:
        return configs.load(None, file=run.config)
    except ValueError as error:
        raise ValueError(f"{run.config} cannot be used; edited, or of another version of sds3d? {error}") from error


def _steps(asset: Asset, teacher: Teacher, resume: bool = False) -> Iterator[Step]:
    """The loop of an asset's run."""
    config = asset.config
    critic = configs.make_critic(config, teacher)
    objective = configs.make_objective(config, teacher, critic)
    cameras = orbit(4, elevation=config.export.elevation)  # of the progress pictures
    return train(
        asset.student,
        {objective.name: objective},
        configs.make_plan(config),
        asset.run,
        resume=resume,
        picture=lambda: asset.views(cameras),
        critic=critic,
    )


def generate(prompt: str, **overrides: Any) -> Asset:
    """Make a 3D asset from a text prompt.

    Args:
        prompt: what to make, in words its teacher knows.
        overrides: any setting: ``seed=3``, ``steps=800``, ``method="sds"``, ``render={"resolution": 32}`` or
            ``**{"render.resolution": 32}``.

    Returns:
        The finished asset; its run folder (``asset.path``) holds mesh.glb, turntable.mp4, preview.png ...

    Raises:
        ValueError: a setting or a word that is not known, or a folder that cannot be written.
    """
    asset, steps = start(configs.load(prompt, overrides))
    for _ in steps:
        pass
    for _ in asset.finish():
        pass
    return asset
