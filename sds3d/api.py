"""The Python interface: functions that build a run from settings, train it and write its files."""

from __future__ import annotations

from typing import Any

from sds3d.config import load as configs
from sds3d.config.schema import Config, DistillConfig, PaintConfig, RunConfig
from sds3d.runs.generator import Generated, load_generator
from sds3d.runs.image import Painting
from sds3d.runs.launch import prepare, start
from sds3d.runs.scene import Asset

__all__ = ["Asset", "Generated", "Painting", "generate", "load_generator", "paint", "train_generator"]


def generate(prompt: str, **overrides: Any) -> Asset:
    """Make a 3D asset from a text prompt.

    Args:
        prompt: what to make, in words that the teacher knows.
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
    return _finished(configs.load(prompt, overrides, kind=Config))


def paint(prompt: str, **overrides: Any) -> Painting:
    """Make images from a text prompt by optimising their pixels.

    Args:
        prompt: what to paint, in words that the teacher knows; it may name a view.
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
    return _finished(configs.load(prompt, overrides, kind=PaintConfig))


def train_generator(**overrides: Any) -> Generated:
    """Train a generator that draws in one step, or a few, what its teacher draws in many.

    Args:
        overrides: any settings: ``teacher="digits"``, ``method="dmd"``, ``steps=4000``, ``generator={"batch": 64}`` ...

    Returns:
        The finished run. Its folder (``path``) holds generator.safetensors, or pipeline/ if the teacher is a diffusers
        pipeline, with README.md and grid.png. `load_generator(path)` loads the generator.

    Raises:
        ValueError: a setting is unknown, or the run folder cannot be written.

    Examples:
        >>> import sds3d
        >>> made = sds3d.train_generator(teacher="digits", steps=2, generator={"batch": 4})
        >>> generator = sds3d.load_generator(made.path)
        >>> generator(["a handwritten seven"] * 16, seed=0).shape  # in [0, 1]
        torch.Size([16, 3, 8, 8])
    """
    if isinstance(overrides.get("teacher"), str):
        overrides["teacher"] = {"name": overrides["teacher"]}
    return _finished(configs.load(None, overrides, kind=DistillConfig))


def _finished(config: RunConfig) -> Any:
    """Train a new run and write its files. Returns the result."""
    for _ in prepare(config):
        pass
    made, steps = start(config)
    for _ in steps:
        pass
    for _ in made.finish():
        pass
    return made
