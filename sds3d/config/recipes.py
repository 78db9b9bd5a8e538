"""The recipes: settings of a method that ship with the package, as YAML files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sds3d.config import plain_yaml
from sds3d.config.schema import Config, DistillConfig, PaintConfig, RunConfig
from sds3d.config.typed import merge
from sds3d.diffusion.timesteps import TimestepSampler
from sds3d.students.scene import field, regularisers


def recipes_folder() -> Path:
    """Return the folder of the recipes: inside an installed package, or configs/ beside the package in a clone."""
    package = Path(__file__).parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


PIPELINES = recipes_folder() / "pipelines"

_SHARED = {f.name for f in dataclasses.fields(RunConfig)} - {"optim", "steps", "log"}


def recipe(name: str, kind: type[RunConfig] = Config, pipeline: bool = False) -> dict[str, Any]:
    """Return the settings of a method's recipe, which ships with the package; empty if it has none.

    Images take the settings that they have from a scene's recipe, and keep their own learning rates. Generators have
    recipes in the folder distill; scenes and images with a diffusers pipeline have recipes in the folder pipelines.
    """
    folder = PIPELINES if pipeline else recipes_folder()
    own = (recipes_folder() / "distill" if kind is DistillConfig else folder) / f"{name}.yaml"
    values = read_yaml(own) if own.is_file() else {}
    if kind is not DistillConfig and (values or pipeline):  # what the recipes of scenes have in common
        values = merge(read_yaml(folder / "scene.yaml"), values)
    return {k: v for k, v in values.items() if k in _SHARED} if kind is PaintConfig else values


def fitting(values: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe without the settings that do not fit the user's.

    These are settings for one kind of field if the user chooses another kind (``field.kind``), and the range of t on
    the surface if the user gives t in another unit (``time.unit``).
    """

    def chosen(part: str, name: str) -> Any:
        group = settings.get(part)
        return group.get(name) if isinstance(group, Mapping) else None

    kind, unit = chosen("field", "kind"), chosen("time", "unit")
    only = {"field": field.ONLY_FOR, "regularise": regularisers.ONLY_FOR} if kind is not None else {}
    unfit = {(part, name) for part, names in only.items() for name, own in names.items() if own != kind}
    unfit |= {("domains", "t_min"), ("domains", "t_max")} if unit not in (None, TimestepSampler.unit) else set()
    return {
        key: {name: v for name, v in part.items() if (key, name) not in unfit} if isinstance(part, Mapping) else part
        for key, part in values.items()
    }


def read_file(file: Path, kind: type[RunConfig] | None) -> dict[str, Any]:
    """Return the settings of a YAML file, or of the recipe of that name for a single model.

    Only scenes take all of a recipe.
    """
    shipped = PIPELINES / f"{file}.yaml"
    if file.exists() or not shipped.is_file():
        return read_yaml(file)
    values = read_yaml(shipped)
    return values if kind in (None, Config) else {k: v for k, v in values.items() if k in _SHARED}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping without resolving references. Raises ValueError if the file is missing or no mapping."""
    values = plain_yaml.read_file(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no settings; give lines such as steps: 800")
    return {str(k): v for k, v in values.items()}
