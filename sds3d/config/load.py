"""Builds a run's config from defaults, recipes, YAML files and ``key=value`` overrides.

Each layer overrides those before it: the defaults in `sds3d.config.schema`; the method's recipe
(``configs/<method>.yaml``, or, for a diffusers pipeline, ``scene.yaml`` and ``<method>.yaml`` in
``configs/pipelines``); a user's file; keyword arguments or flags; ``key=value``.

A number may be written as ``${steps}``, or as ``${part:0.75}`` for that fraction of the steps, rounded, so that a
recipe's ramps follow the number of steps. There are no other references, and none in text, since a file may come from
a stranger.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
import typing
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sds3d.config import plain_yaml, recipes
from sds3d.config.schema import Config, DistillConfig, PaintConfig, RunConfig
from sds3d.config.typed import build, convert, keys, merge, nearest, plain, require_maps
from sds3d.distill.core import Method
from sds3d.distill.score import METHODS
from sds3d.runtime.errors import stacklevel
from sds3d.runtime.ranges import shown
from sds3d.teachers.base import PACKAGED
from sds3d.teachers.hf import loading

PICKLE = "teacher.hf.allow_pickle"  # no file may set it: a pickle can run any program
# Paths that a run reads, which are stored as absolute paths, and paths that it writes, which are only checked.
INPUT_PATHS = (
    *("teacher.name", "teacher.normals.name", "source.run", "image.start", "generator.prompts", "pairs.folder", "real"),
)
OUTPUT_PATHS = ("out", "teacher.hf.cache")
RENAMED = {  # old name of a setting, which is still accepted -> its new name
    "export.mesh_resolution": "export.mesh.resolution",
    "export.threshold": "export.mesh.level",
    **{f"export.{name}": f"export.mesh.{name}" for name in ("keep", "fill", "smooth", "faces", "colours", "texture")},
}


def load(
    prompt: str | None,
    *layers: Mapping[str, Any],
    file: str | Path | None = None,
    kind: type[RunConfig] | None = None,
) -> Any:
    """Build the config of a run: a ``Config``, a ``PaintConfig`` or a ``DistillConfig``.

    Args:
        prompt: what to make; None if the layers or the file have it, as a run's config.yaml does.
        layers: mappings, or OmegaConf's configs, with nested or dotted keys. Later ones override earlier ones.
        file: a YAML file, which overrides the recipe and is overridden by the layers; or the name of a recipe for a
            single model: if, sd3.
        kind: the class to build. None means a PaintConfig if the key "image" is set, a DistillConfig if "generator" is
            set, else a Config.

    Raises:
        ValueError: a key is unknown, a value has a wrong type or range, or the file is missing, no YAML, or unsafe.
    """
    settings = recipes.read_file(Path(file), kind) if file is not None else {}
    if _at(settings, PICKLE):
        raise ValueError(f"{file} sets {PICKLE}, and a pickle can run any program; take the line out, {_FLAG}")
    return _from_layers(prompt, [settings, *layers], kind)


def _from_layers(
    prompt: str | None, layers: list[Mapping[str, Any]], kind: type[RunConfig] | None, with_recipe: bool = True
) -> Any:
    """Build a config from layers, which lie over the recipe of their method, or else over the defaults alone."""
    settings: dict[str, Any] = {}
    for layer in (_renamed(_nested(_without_omegaconf(layer))) for layer in layers):
        merged = merge(settings, layer)
        settings = merged if _same_method(settings, layer) else {**merged, "method": layer["method"]}
    if prompt is not None:
        settings["prompt"] = prompt
    kind = kind or (PaintConfig if "image" in settings else DistillConfig if "generator" in settings else Config)
    if kind is DistillConfig:
        settings.setdefault("prompt", "")
    if "prompt" not in settings:
        raise ValueError('there is no prompt; say what to make, as in: sds3d generate "a red mug"')
    require_maps(kind, settings)
    if settings.get("method") is None:  # null is the default
        settings.pop("method", None)
    settings = _with_absolute_paths(settings)
    method = settings.get("method", {})
    name = method.get("name", default_method(kind)) if isinstance(method, Mapping) else method
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method is {shown(name)}; {nearest(str(name), METHODS)} (there is {', '.join(METHODS)})")
    default = kind("a red mug")
    defaults = plain(default)  # complete, so that a recipe that sets optim.lr.grid keeps optim.lr.mlp
    del defaults["prompt"], defaults["method"]
    defaults["time"]["steps"] = "${steps}"
    for group, ramp in default.optim.lr.items():
        if ramp.end == default.steps:  # the ramp ends with the run, so it scales with the number of steps
            part = f"${{part:{ramp.start / default.steps}}}"
            defaults["optim"]["lr"][group] = [part, ramp.v0, ramp.v1, "${steps}"]
    teacher = settings.get("teacher")
    pipeline = isinstance(teacher, Mapping) and loading.is_pipeline(str(teacher.get("name") or ""))
    usual = recipes.fitting(recipes.recipe(name, kind, pipeline), settings) if with_recipe else {}
    return _typed(_resolved(merge(merge(defaults, usual), settings)), name, kind)


def default_method(kind: type[RunConfig]) -> str:
    """Return the name of the default method of a kind of run."""
    return "diffinstruct" if kind is DistillConfig else "sds"


def _with_absolute_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make paths of existing inputs absolute, so that resume works from any folder. Raises ValueError for no path."""
    for key in (*INPUT_PATHS, *OUTPUT_PATHS):
        value = _at(settings, key)
        text = "" if value is None else str(value)
        try:
            path = Path(text).expanduser()
            is_input = path != Path() and text not in PACKAGED and path.exists() and key in INPUT_PATHS
            absolute = str(path.resolve()) if is_input else ""
        except RuntimeError as error:
            raise ValueError(f"{key} is {shown(text)}; there is no such user here, give a path") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{key} is {shown(text)}, which is no path here: {reason}") from error
        if absolute and (key != "real" or path.is_dir()):
            settings = merge(settings, _nested({key: absolute}))
    return dict(settings)


def _at(values: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; None if there is none."""
    node: Any = values
    for name in key.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _typed(values: dict[str, Any], name: str, kind: type[RunConfig]) -> RunConfig:
    """Check the merged settings and convert them to a config."""
    fields = dict(values.pop("method", {}))
    fields.pop("name", None)
    known = [*keys(kind), "method.name", *keys(METHODS[name], "method")]
    return build(kind, {**values, "method": build(METHODS[name], fields, "method", known)}, known=known)


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Parse ``key=value`` texts into a nested mapping. Raises ValueError if one cannot be parsed.

    The value of a setting whose type is text (see `text_keys`) is taken as it is written. Other values are YAML.
    """
    layer: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or key != key.strip():
            raise ValueError(f"{shown(text)} is no key=value; write settings as steps=800, and the prompt in quotes")
        if key in text_keys():
            layer = merge(layer, _nested({key: value}))
            continue
        try:
            node = plain_yaml.read(value)
        except ValueError as error:
            raise ValueError(f"cannot read {shown(text)}; give key=value with a value in YAML ({error})") from error
        layer = merge(layer, _nested({key: node}))
    if _at(layer, PICKLE) is not None:
        raise ValueError(f"{PICKLE} cannot be given as a setting; {_FLAG}")
    return _renamed(layer)


_FLAG = "give --allow-pickle, a flag of generate, paint, distill, compare and resume"


@functools.cache
def text_keys() -> frozenset[str]:
    """Return the dotted keys of the settings whose type is text, for all kinds of runs."""

    def of(cls: type, prefix: str = "") -> set[str]:
        keys: set[str] = set()
        for name, kind in typing.get_type_hints(cls).items():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                keys |= of(kind, f"{prefix}{name}.")
            elif kind is str:
                keys.add(prefix + name)
        return keys

    return frozenset(of(Config) | of(PaintConfig) | of(DistillConfig))


def refuse_twice(flags: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Raise ValueError if a flag and a ``key=value`` give different values to one setting."""
    flags = _nested(flags)
    for key in sorted(leaves(flags) & leaves(overrides)):
        first, second = _at(flags, key), _at(overrides, key)
        if first != second:
            key = "method" if key == "method.name" else key
            raise ValueError(f"{key} is given twice, as {shown(first)} and as {key}={shown(second)}; give one of them")


def of_run(path: Path) -> Any:
    """Read a run's config.yaml. Pickles must be allowed again by the user. Raises ValueError that names the file."""
    try:
        values = _renamed(_nested(recipes.read_yaml(path)), warn=False)  # nobody can change how an old run was written
        if _at(values, PICKLE) is not None:
            values = merge(values, _nested({PICKLE: False}))
        return _from_layers(None, [values], None, with_recipe=False)  # it holds all settings that there were then
    except ValueError as error:
        raise ValueError(f"{path} cannot be used; was it edited, or made by another version? {error}") from error


def to_plain(config: RunConfig) -> dict[str, Any]:
    """Convert a config to plain values, with all settings."""
    values = plain(config)
    values["method"] = {"name": name_of(config.method), **values["method"]}
    return values


def to_yaml(config: RunConfig) -> str:
    """Write a config as YAML, with all settings. ``load(None, file=...)`` returns the same config."""
    return plain_yaml.write(to_plain(config))


def name_of(method: Method) -> str:
    """Return the name of a method in METHODS."""
    return next(name for name, kind in METHODS.items() if type(method) is kind)


_REFERENCE = re.compile(r"\$\{ *(?:steps|part: *(0|1|0?\.[0-9]{1,20}|[01]\.[0-9]{1,20})) *\}")


def _resolved(values: dict[str, Any]) -> dict[str, Any]:
    """Replace ``${steps}`` and ``${part:0.75}`` by numbers."""
    steps = convert(int, values["steps"], "steps")
    if steps < 1:
        raise ValueError(f"steps is {shown(steps)}; give 1 or more")
    stages = values.get("render", {}).get("resolution")
    resolved = _with_numbers(values, steps)
    # In a short run several stages may begin at one step. The last of them counts.
    if isinstance(stages, list) and "${" in str(stages):
        pairs = [stage for stage in resolved["render"]["resolution"] if isinstance(stage, list) and len(stage) == 2]
        if len(pairs) == len(stages) and all(isinstance(since, int) for since, _ in pairs):
            resolved["render"]["resolution"] = [list(stage) for stage in dict(pairs).items()]
    return resolved


def _with_numbers(value: Any, steps: int, key: str = "") -> Any:
    """The settings with references replaced by numbers. In text settings, ``${...}`` stays as it is."""
    if isinstance(value, Mapping):
        return {name: _with_numbers(v, steps, f"{key}.{name}" if key else name) for name, v in value.items()}
    if isinstance(value, list):
        return [_with_numbers(v, steps, key) for v in value]
    if not isinstance(value, str) or "${" not in value or key in text_keys():
        return value
    match = _REFERENCE.fullmatch(value)
    if match is None or (match[1] and float(match[1]) > 1):
        raise ValueError(
            f"cannot resolve the settings: {key} is {shown(value)}; give a value, ${{steps}}, or ${{part:0.75}} for a "
            "part of the steps from 0 to 1"
        )
    return round(float(match[1]) * steps) if match[1] else steps


def _same_method(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    """Whether a layer keeps the method of the layers below. If not, the settings of that method are dropped."""
    methods = [layer.get("method") for layer in (below, above)]
    names = [method.get("name") if isinstance(method, Mapping) else None for method in methods]
    return names[1] is None or names[0] in (None, names[1])


def _without_omegaconf(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """A layer; an OmegaConf config becomes plain values, with its references resolved."""
    if "omegaconf" not in sys.modules:  # if it is not imported, no config can be OmegaConf's
        return layer
    from omegaconf import OmegaConf

    if not OmegaConf.is_config(layer):
        return layer
    container: Any = OmegaConf.to_container(layer, resolve=True)  # a dict, since the layer is a mapping
    return container


def _nested(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested mappings, dataclasses and ramps into plain values, ``method`` into a mapping."""
    out: dict[str, Any] = {}
    for key, value in layer.items():
        if str(key).count(".") > 8:
            raise ValueError(f"unknown key {shown(key)}; no key has so many parts")
        node = _nested(value) if isinstance(value, Mapping) else plain(value)
        if key == "method" and isinstance(value, str):
            node = {"name": value}
        for name in reversed(str(key).split(".")):
            node = {name: node}
        out = merge(out, node)
    return out


def _renamed(layer: dict[str, Any], warn: bool = True) -> dict[str, Any]:
    """Rename the settings of a nested layer that have a new name. Raises ValueError if one is given by both names."""
    given = {old: new for old, new in RENAMED.items() if old in leaves(layer)}
    for old, new in given.items():
        if new in leaves(layer):
            raise ValueError(f"{new} is given twice, once as {old}, its old name; give it once")
        parent = new.rpartition(".")[0]
        if parent in leaves(layer):  # it is no mapping, which merge would replace
            raise ValueError(f"{parent} is {shown(_at(layer, parent))}; give its parts, as in {new}=...")
        layer = merge(_without(layer, old), _nested({new: _at(layer, old)}))
    if given and warn:
        old, new = ", ".join(given), ", ".join(given.values())
        warnings.warn(f"{old} {'is' if len(given) == 1 else 'are'} now called {new}", stacklevel=stacklevel())
    return layer


def _without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a nested mapping without a dotted key."""
    name, _, rest = key.partition(".")
    return {k: _without(v, rest) if k == name else v for k, v in values.items() if rest or k != name}


MEMORY_KEYS = {  # may change on resume: they trade memory for time, and change images by rounding only
    "render.chunk",
    "critic.checkpointing",
    *(f"teacher.hf.{name}" for name in ("checkpointing", "slicing", "tiling", "attention_slicing", "offload")),
}


def leaves(values: Mapping[str, Any], prefix: str = "") -> set[str]:
    """The dotted keys of all values in nested mappings."""
    keys: set[str] = set()
    for key, value in values.items():
        keys |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key}
    return keys


def changed(config: RunConfig, layer: Mapping[str, Any]) -> Any:
    """Return a run's config with changes that are allowed on resume: steps, device, backend, fsdp, log.*, export.*,
    and settings that only save memory (``MEMORY_KEYS``).

    Raises:
        ValueError: the layer changes another setting, or gives more steps to a run whose learning rate ended at 0.
    """
    mutable = ("steps", "device", "backend", "fsdp", "log", "export")
    free = [f.name for f in dataclasses.fields(config) if f.name in mutable]
    layer = _renamed(_nested(layer))
    for key in layer:
        keys_below = leaves({key: layer[key]})
        if key not in free and not (keys_below and keys_below <= {*MEMORY_KEYS, PICKLE}):
            raise ValueError(f"{shown(key)[1:-1]} cannot change on resume, only {', '.join(free)}; start a new run")
    values = {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.name in layer}
    fresh = build(type(config), {"prompt": config.prompt, **merge(values, layer)})
    steps = fresh.steps if "steps" in layer else config.steps
    if steps > config.steps:
        ends = [name for name, ramp in config.optim.lr.items() if ramp(config.steps) == 0]
        if ends:
            raise ValueError(
                f"the learning rate of {ends[0]} is 0 from step {config.steps} on, so more steps would teach nothing; "
                f"start a new run with steps={steps}"
            )
    return dataclasses.replace(config, **{key: getattr(fresh, key) for key in layer})
