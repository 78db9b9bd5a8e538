"""The Python interface: functions that build a run from settings, train it and write its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sds3d.config import load as configs
from sds3d.config.schema import Config, DistillConfig, PaintConfig, RunConfig
from sds3d.runs import launch
from sds3d.runs.build import refuse_settings_of_teacher, with_teacher
from sds3d.runs.generator import Generated, load_generator
from sds3d.runs.image import Painting
from sds3d.runs.scene import Asset
from sds3d.teachers.base import Teacher, TeacherConfig

Given = Teacher | str | Path | Mapping[str, Any] | TeacherConfig | None  # how a user gives a teacher

__all__ = ["Asset", "Generated", "Painting", "generate", "load_generator", "paint", "resume", "train_generator"]


def generate(prompt: str, *, teacher: Given = None, **overrides: Any) -> Asset:
    """Make a 3D asset from a text prompt.

    Args:
        prompt: what to make, in words that the teacher knows.
        teacher: a name or folder, settings, or an object with the members of `sds3d.teachers.base.Teacher`, which it
            need not inherit from. For an object, the run's config.yaml names its class, and `resume` needs such an
            object again.
        overrides: any settings: ``seed=3``, ``steps=800``, ``method="vsd"``, ``render={"resolution": 32}`` or
            ``**{"render.resolution": 32}``.

    Returns:
        The finished asset. Its run folder (``asset.path``) holds mesh.glb, turntable.mp4, preview.png ...

    Raises:
        ValueError: a setting or a word of the prompt is unknown, or the run folder cannot be written.

    Examples:
        >>> # Not run as a test: it takes more than a minute.
        >>> asset = sds3d.generate("a red mug", seed=3)  # doctest: +SKIP
        >>> asset.export("mug.glb")  # doctest: +SKIP
    """
    return _new(Config, prompt, teacher, overrides)


def paint(prompt: str, *, teacher: Given = None, **overrides: Any) -> Painting:
    """Make images from a text prompt by optimising their pixels.

    Args:
        prompt: what to paint, in words that the teacher knows; it may name a view.
        teacher: as in `generate`.
        overrides: any settings: ``method="vsd"``, ``image={"count": 8}``, ``steps=400`` ...

    Returns:
        The finished painting with its ``images``. Its run folder (``painting.path``) holds image.png and
        progress/strip.png.

    Raises:
        ValueError: a setting or a word of the prompt is unknown, or the run folder cannot be written.

    Examples:
        >>> import sds3d
        >>> painting = sds3d.paint("a red mug, front view", steps=2, image={"count": 2})
        >>> painting.images.shape  # in [0, 1]
        torch.Size([2, 3, 64, 64])
    """
    return _new(PaintConfig, prompt, teacher, overrides)


def train_generator(
    *, teacher: str | Path | Mapping[str, Any] | TeacherConfig | None = None, **overrides: Any
) -> Generated:
    """Train a generator that draws in one step, or a few, what its teacher draws in many.

    Args:
        teacher: a name, as "digits", or settings.
        overrides: any settings: ``method="dmd"``, ``steps=4000``, ``generator={"batch": 64}`` ...

    Returns:
        The finished run. Its folder (``path``) holds generator.safetensors, or pipeline/ if the teacher is a diffusers
        pipeline, with README.md and grid.png. `load_generator(path)` loads the generator.

    Raises:
        ValueError: a setting is unknown, or the run folder cannot be written.

    Examples:
        >>> import sds3d
        >>> run = sds3d.train_generator(teacher="digits", steps=2, generator={"batch": 4})
        >>> generator = sds3d.load_generator(run.path)
        >>> generator(["a handwritten seven"] * 16, seed=0).shape  # in [0, 1]
        torch.Size([16, 3, 8, 8])
    """
    return _new(DistillConfig, None, teacher, overrides)


def resume(run: str | Path, *, teacher: Teacher | None = None, **overrides: Any) -> Asset | Painting | Generated:
    """Resume a run from its checkpoint, and finish it.

    Args:
        run: its folder.
        teacher: of a run whose teacher was an object, another object of the same class.
        overrides: settings to change: ``steps``, ``device``, ``backend``, ``fsdp``, ``log``, ``export``.

    Returns:
        The finished run.

    Raises:
        ValueError: the run is missing or damaged, a setting may not change, or the teacher is not the run's.

    Examples:
        >>> # Not run as a test: it needs a run.
        >>> asset = sds3d.resume("outputs/00001-a-red-mug", steps=800)  # doctest: +SKIP
    """
    return _finished(*launch.resume(run, overrides, teacher))


def _new(kind: type[RunConfig], prompt: str | None, teacher: Any, overrides: dict[str, Any]) -> Any:
    """Train a new run and write its files. Returns the result."""
    if isinstance(teacher, str | Path):
        teacher = {"name": str(teacher)}
    if isinstance(teacher, Mapping | TeacherConfig):
        overrides["teacher"], teacher = teacher, None
    elif teacher is not None:
        refuse_settings_of_teacher(overrides)
    config = with_teacher(configs.load(prompt, overrides, kind=kind), teacher)
    for _ in launch.prepare(config):
        pass
    return _finished(*launch.start(config, teacher))


def _finished(result: Any, steps: Any) -> Any:
    for _ in steps:
        pass
    for _ in result.finish():
        pass
    return result
