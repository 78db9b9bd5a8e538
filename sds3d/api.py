"""What Python users call: each makes a run from its settings and carries it out."""

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
from sds3d.teachers.base import Teacher

__all__ = ["Asset", "Generated", "Painting", "generate", "load_generator", "paint", "resume", "train_generator"]


def generate(prompt: str, *, teacher: Teacher | str | Mapping[str, Any] | None = None, **overrides: Any) -> Asset:
    """Make a 3D asset from a text prompt.

    Args:
        prompt: what to make, in words its teacher knows.
        teacher: a name, settings, or an object that follows `sds3d.teachers.base.Teacher`: the run's config.yaml then
            names its class, and `resume` takes it again.
        overrides: any setting: ``seed=3``, ``steps=800``, ``method="vsd"``, ``render={"resolution": 32}`` or
            ``**{"render.resolution": 32}``.

    Returns:
        The finished asset; its run folder (``asset.path``) holds mesh.glb, turntable.mp4, preview.png ...

    Raises:
        ValueError: a setting or a word that is not known, or a folder that cannot be written.

    Examples:
        >>> # Not run as a test: it takes more than a minute.
        >>> asset = sds3d.generate("a red mug", seed=3)  # doctest: +SKIP
        >>> asset.export("mug.glb")  # doctest: +SKIP
    """
    return _new(Config, prompt, teacher, overrides)


def paint(prompt: str, *, teacher: Teacher | str | Mapping[str, Any] | None = None, **overrides: Any) -> Painting:
    """Make images from a text prompt, by optimising their pixels.

    Args:
        prompt: what to paint, in words its teacher knows; view words count.
        teacher: as in `generate`.
        overrides: any setting: ``method="vsd"``, ``image={"count": 8}``, ``steps=400`` ...

    Returns:
        The finished painting: ``painting.images``; its run folder (``painting.path``) holds image.png and the strip of
        its progress.

    Raises:
        ValueError: a setting or a word that is not known, or a folder that cannot be written.

    Examples:
        >>> import sds3d
        >>> painting = sds3d.paint("a red mug, front view", steps=2, image={"count": 2})
        >>> painting.images.shape  # in [0, 1]
        torch.Size([2, 3, 64, 64])
    """
    return _new(PaintConfig, prompt, teacher, overrides)


def train_generator(*, teacher: str | Mapping[str, Any] | None = None, **overrides: Any) -> Generated:
    """Train a generator that paints in one step, or a few, what a teacher paints in many.

    Args:
        teacher: a name, as "digits", or settings.
        overrides: any setting: ``method="dmd"``, ``steps=4000``, ``generator={"batch": 64}`` ...

    Returns:
        The finished run: its folder (``path``) holds generator.safetensors (or, of a diffusers pipeline, one in
        pipeline/), its card, grid.png; `load_generator(path)` paints.

    Raises:
        ValueError: a setting that is not known, or a folder that cannot be written.

    Examples:
        >>> import sds3d
        >>> made = sds3d.train_generator(teacher="digits", steps=2, generator={"batch": 4})
        >>> generator = sds3d.load_generator(made.path)
        >>> generator(["a handwritten seven"] * 16, seed=0).shape  # in [0, 1]
        torch.Size([16, 3, 8, 8])
    """
    return _new(DistillConfig, None, teacher, overrides)


def resume(run: str | Path, *, teacher: Teacher | None = None, **overrides: Any) -> Asset | Painting | Generated:
    """Go on with a run where it stopped, and finish it.

    Args:
        run: its folder.
        teacher: of a run whose teacher was an object, another of the same class.
        overrides: what may change: ``steps``, ``device``, ``backend``, ``fsdp``, ``log``, ``export``.

    Returns:
        The finished run.

    Raises:
        ValueError: no such run, a damaged one, a setting that may not change, or another teacher than the run's.

    Examples:
        >>> # Not run as a test: it needs a run.
        >>> asset = sds3d.resume("outputs/00001-a-red-mug", steps=800)  # doctest: +SKIP
    """
    return _carried_out(*launch.resume(run, overrides, teacher))


def _new(kind: type[RunConfig], prompt: str | None, teacher: Any, overrides: dict[str, Any]) -> Any:
    """A new run, carried out."""
    if isinstance(teacher, str | Mapping):
        overrides["teacher"] = {"name": teacher} if isinstance(teacher, str) else teacher
        teacher = None
    elif teacher is not None:
        refuse_settings_of_teacher(overrides)
    config = with_teacher(configs.load(prompt, overrides, kind=kind), teacher)
    for _ in launch.prepare(config):
        pass
    return _carried_out(*launch.start(config, teacher))


def _carried_out(made: Any, steps: Any) -> Any:
    for _ in steps:
        pass
    for _ in made.finish():
        pass
    return made
