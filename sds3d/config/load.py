"""What a user can set: one typed tree, its YAML, recipes and ``key=value`` overrides. make.py builds from it.

Layers, each over the one before: the defaults of the dataclasses, the method's recipe (``configs/<method>.yaml``; for
a diffusers pipeline as the teacher ``scene.yaml`` and ``<method>.yaml`` of ``configs/pipelines``), a user's file,
keyword arguments or flags, ``key=value``. ``${steps}`` and ``${part:0.75}`` (that part of the steps, rounded) may stand
for any number, so that a recipe's ramps follow the number of steps. There are no other references, and none in text: a
file may come from a stranger.
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

from sds3d.config import plain_yaml
from sds3d.config.schema import Config, DistillConfig, PaintConfig, RunConfig
from sds3d.config.typed import build, convert, keys, merge, nearest, plain, require_maps
from sds3d.distill.core import Method
from sds3d.distill.score import METHODS
from sds3d.runtime.ranges import shown
from sds3d.teachers.base import PACKAGED
from sds3d.teachers.hf import loading

PICKLE = "teacher.hf.allow_pickle"  # which no file may set: a pickle can run any program
PATHS = ("teacher.name", "source.run", "image.start", "generator.prompts", "pairs.folder", "real")  # found again ...
PLACES = ("out", "teacher.hf.cache")  # ... and those that are made where a run is made
RENAMED = {  # settings that had another name, and still answer to it
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
    """The config of a run: a ``Config``, a ``PaintConfig`` or a ``DistillConfig``.

    Args:
        prompt: what to make; None takes it from the layers (a run's config.yaml has one).
        layers: nested or dotted keys, later ones win; mappings, or OmegaConf's configs.
        file: a YAML file under the layers, over the recipe; or the name of one of those for single models: if, sd3.
        kind: which; None takes a PaintConfig where there are settings of an image, a DistillConfig where there are
            some of a generator, else a Config.

    Raises:
        ValueError: unknown keys, wrong types, values nobody can use, a file that is missing or is no YAML, or that lets
            pickles be read.
    """
    given = _of_file(Path(file), kind) if file is not None else {}
    if _at(given, PICKLE):
        raise ValueError(f"{file} sets {PICKLE}, and a pickle can run any program; take the line out, {_FLAG}")
    return _loaded(prompt, [given, *layers], kind)


def _loaded(prompt: str | None, layers: list[Mapping[str, Any]], kind: type[RunConfig] | None) -> Any:
    """A config from layers."""
    given: dict[str, Any] = {}
    for layer in (_renamed(_nested(_opened(layer))) for layer in layers):
        given = (
            merge(given, layer) if _same_method(given, layer) else {**merge(given, layer), "method": layer["method"]}
        )
    if prompt is not None:
        given["prompt"] = prompt
    kind = kind or (PaintConfig if "image" in given else DistillConfig if "generator" in given else Config)
    if kind is DistillConfig:
        given.setdefault("prompt", "")
    if "prompt" not in given:
        raise ValueError('there is no prompt; say what to make, as in: sds3d generate "a red mug"')
    require_maps(kind, given)
    if given.get("method") is None:  # null is the default
        given.pop("method", None)
    given = _from_anywhere(given)
    method = given.get("method", {})
    name = method.get("name", default_method(kind)) if isinstance(method, Mapping) else method
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method is {shown(name)}; {nearest(str(name), METHODS)} (there is {', '.join(METHODS)})")
    usual = kind("a red mug")
    defaults = plain(usual)  # whole, so that a recipe that sets optim.lr.grid keeps optim.lr.mlp
    del defaults["prompt"], defaults["method"]
    defaults["time"]["steps"] = "${steps}"
    for group, ramp in usual.optim.lr.items():
        if ramp.end == usual.steps:  # it changes over the run, however long that is
            part = f"${{part:{ramp.start / usual.steps}}}"
            defaults["optim"]["lr"][group] = [part, ramp.v0, ramp.v1, "${steps}"]
    teacher = given.get("teacher")
    pipeline = isinstance(teacher, Mapping) and loading.is_pipeline(str(teacher.get("name") or ""))
    return _typed(_resolved(merge(merge(defaults, recipe(name, kind, pipeline)), given)), name, kind)


def default_method(kind: type[RunConfig]) -> str:
    """The name of the method of a run that names none."""
    return "diffinstruct" if kind is DistillConfig else "sds"


def _from_anywhere(given: Mapping[str, Any]) -> dict[str, Any]:
    """Make paths absolute where they lead somewhere, so that resume works from any folder. Raises ValueError for a text
    that can be no path."""
    for key in (*PATHS, *PLACES):
        value = _at(given, key)
        text = "" if value is None else str(value)
        try:
            path = Path(text).expanduser()
            found = path != Path() and text not in PACKAGED and path.exists() and key in PATHS
            absolute = str(path.resolve()) if found else ""
        except RuntimeError as error:
            raise ValueError(f"{key} is {shown(text)}; there is no such user here, give a path") from error
        except (OSError, ValueError) as error:
            what = getattr(error, "strerror", None) or error
            raise ValueError(f"{key} is {shown(text)}, which is no path here: {what}") from error
        if absolute and (key != "real" or path.is_dir()):
            given = merge(given, _nested({key: absolute}))
    return dict(given)


def _at(values: Mapping[str, Any], key: str) -> Any:
    """What stands at a dotted key; None where nothing does."""
    node: Any = values
    for name in key.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _typed(values: dict[str, Any], name: str, kind: type[RunConfig]) -> RunConfig:
    """Check and convert a merged tree."""
    fields = dict(values.pop("method", {}))
    fields.pop("name", None)
    known = [*keys(kind), "method.name", *keys(METHODS[name], "method")]
    return build(kind, {**values, "method": build(METHODS[name], fields, "method", known)}, known=known)


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """``key=value`` texts as a nested mapping. Raises ValueError.

    The value of a setting whose type is text (`text_keys`) is taken as it is written. Other values are read as YAML.
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
        raise ValueError(f"{PICKLE} is no setting to write down; {_FLAG}")
    return _renamed(layer)


_FLAG = "give --allow-pickle, a flag of generate, paint, distill, compare and resume"


@functools.cache
def text_keys() -> frozenset[str]:
    """Dotted names of the settings whose type is text, of every kind of run."""

    def of(cls: type, above: str = "") -> set[str]:
        found: set[str] = set()
        for name, kind in typing.get_type_hints(cls).items():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                found |= of(kind, f"{above}{name}.")
            elif kind is str:
                found.add(above + name)
        return found

    return frozenset(of(Config) | of(PaintConfig) | of(DistillConfig))


def refuse_twice(flags: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """Refuse a setting that a flag and a ``key=value`` give differently. Raises ValueError."""
    flags = _nested(flags)
    for key in sorted(_leaves(flags) & _leaves(overrides)):
        first, second = _at(flags, key), _at(overrides, key)
        if first != second:
            key = "method" if key == "method.name" else key
            raise ValueError(f"{key} is given twice, as {shown(first)} and as {key}={shown(second)}; give one of them")


def recipe(name: str, kind: type[RunConfig] = Config, pipeline: bool = False) -> dict[str, Any]:
    """The recipe that ships with the package, by method name; empty where a method has none. The recipes are for
    scenes: images take from them what is not about scenes, and keep their own learning rate. Generators have their own,
    in the folder distill, and so have scenes and images by a diffusers pipeline."""
    folder = recipes_folder()
    paths = [folder / f"{name}.yaml"]
    if kind is DistillConfig:
        paths = [folder / "distill" / f"{name}.yaml"]
    elif pipeline:
        paths = [PIPELINES / "scene.yaml", PIPELINES / f"{name}.yaml"]
    values: dict[str, Any] = {}
    for path in paths:
        values = merge(values, read_yaml(path) if path.is_file() else {})
    return {k: v for k, v in values.items() if k in _SHARED} if kind is PaintConfig else values


def recipes_folder() -> Path:
    """Where the recipes are: inside an installed package, or configs/ beside it in a clone."""
    here = Path(__file__).parents[1]
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


PIPELINES = recipes_folder() / "pipelines"

_SHARED = {f.name for f in dataclasses.fields(RunConfig)} - {"optim", "steps", "log"}


def _of_file(file: Path, kind: type[RunConfig] | None) -> dict[str, Any]:
    """What a file says; or the recipe of that name for a single model, of which only a scene takes all."""
    shipped = PIPELINES / f"{file}.yaml"
    if file.exists() or not shipped.is_file():
        return read_yaml(file)
    values = read_yaml(shipped)
    return values if kind in (None, Config) else {k: v for k, v in values.items() if k in _SHARED}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, references unresolved. Raises ValueError where it is missing or is none."""
    values = plain_yaml.read_file(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no settings; give lines such as steps: 800")
    return {str(k): v for k, v in values.items()}


def of_run(path: Path) -> Any:
    """What a run was made with, from its config.yaml. Raises ValueError that names the file.

    Pickles are not allowed, whatever it says: who resumes the run says so again.
    """
    try:
        values = _renamed(_nested(read_yaml(path)), warn=False)  # nobody can change how an old run was written
        if _at(values, PICKLE) is not None:
            values = merge(values, _nested({PICKLE: False}))
        return _loaded(None, [values], None)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used; edited, or of another version of sds3d? {error}") from error


def to_plain(config: RunConfig) -> dict[str, Any]:
    """The config, complete, as plain values."""
    values = plain(config)
    values["method"] = {"name": name_of(config.method), **values["method"]}
    return values


def to_yaml(config: RunConfig) -> str:
    """The config, complete, as YAML; ``load(None, file=...)`` gives the same config again."""
    return plain_yaml.write(to_plain(config))


def name_of(method: Method) -> str:
    """The name in METHODS of a method."""
    return next(name for name, kind in METHODS.items() if type(method) is kind)


_REFERENCE = re.compile(r"\$\{ *(?:steps|part: *(0|1|0?\.[0-9]{1,20}|[01]\.[0-9]{1,20})) *\}")


def _resolved(values: dict[str, Any]) -> dict[str, Any]:
    """Replace ``${steps}`` and ``${part:0.75}`` where they stand for numbers."""
    steps = convert(int, values["steps"], "steps")
    if steps < 1:
        raise ValueError(f"steps is {shown(steps)}; give 1 or more")
    stages = values.get("render", {}).get("resolution")
    found = _with_numbers(values, steps)
    if isinstance(stages, list) and "${" in str(stages):  # parts of few steps fall on one: the last of them counts
        pairs = [stage for stage in found["render"]["resolution"] if isinstance(stage, list) and len(stage) == 2]
        if len(pairs) == len(stages) and all(isinstance(since, int) for since, _ in pairs):
            found["render"]["resolution"] = [list(stage) for stage in dict(pairs).items()]
    return found


def _with_numbers(value: Any, steps: int, key: str = "") -> Any:
    """A tree in which references are numbers. Text may say ``${...}``, and means it."""
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
    """Whether a layer leaves the method below it what it was: another method takes none of its settings."""
    methods = [layer.get("method") for layer in (below, above)]
    names = [method.get("name") if isinstance(method, Mapping) else None for method in methods]
    return names[1] is None or names[0] in (None, names[1])


def _opened(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """A layer as it is; a program's own OmegaConf config as plain values, its references resolved."""
    if "omegaconf" not in sys.modules:  # then it cannot be one
        return layer
    from omegaconf import OmegaConf

    if not OmegaConf.is_config(layer):
        return layer
    opened: Any = OmegaConf.to_container(layer, resolve=True)  # of a mapping a dict
    return opened


def _nested(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys opened, dataclasses and ramps as plain values, a method's name as its settings."""
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
    """A nested layer with settings under the names they have now. Raises ValueError where one is given by both."""
    for old, new in RENAMED.items():
        above, _, leaf = old.rpartition(".")
        group = _at(layer, above)
        if not isinstance(group, Mapping) or leaf not in group:
            continue
        if _at(layer, new) is not None:
            raise ValueError(f"{new} is given twice, once as {old}, its old name; give it once")
        if warn:
            warnings.warn(f"{old} is now called {new}", stacklevel=3)
        layer = merge(_without(layer, old), _nested({new: group[leaf]}))
    return layer


def _without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A tree without what stands at a dotted key."""
    name, _, rest = key.partition(".")
    return {k: _without(v, rest) if k == name else v for k, v in values.items() if rest or k != name}


SPARING = {  # what a run may take up or drop where it stopped: memory against time, the same images but for rounding
    "render.chunk",
    "critic.checkpointing",
    *(f"teacher.hf.{name}" for name in ("checkpointing", "slicing", "tiling", "attention_slicing", "offload")),
}


def _leaves(values: Mapping[str, Any], above: str = "") -> set[str]:
    """Dotted names of all that is set."""
    found: set[str] = set()
    for key, value in values.items():
        found |= _leaves(value, f"{above}{key}.") if isinstance(value, Mapping) else {above + key}
    return found


def changed(config: RunConfig, layer: Mapping[str, Any]) -> Any:
    """A run's config with what may change on resume: steps, device, backend, fsdp, log.*, export.*, and what only saves
    memory.

    Raises:
        ValueError: another key, which would no longer be the same run.
    """
    mutable = ("steps", "device", "backend", "fsdp", "log", "export")
    free = [f.name for f in dataclasses.fields(config) if f.name in mutable]
    layer = _renamed(_nested(layer))
    for key in layer:
        leaves = _leaves({key: layer[key]})
        if key not in free and not (leaves and leaves <= {*SPARING, PICKLE}):
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
