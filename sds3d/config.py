"""What a user can set: one typed tree, its YAML, recipes and ``key=value`` overrides. make.py builds from it.

Layers, each over the one before: the defaults of the dataclasses, the method's recipe (``configs/<method>.yaml``; for
a diffusers pipeline as the teacher ``scene.yaml`` and ``<method>.yaml`` of ``configs/pipelines``), a user's file,
keyword arguments or flags, ``key=value``. ``${steps}`` and ``${part:0.75}`` (that part of the steps, rounded) may stand
in any value, so that a recipe's ramps follow the number of steps.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sds3d.distill import METHODS
from sds3d.distill.core import Method
from sds3d.settings import Config, DistillConfig, PaintConfig, RunConfig
from sds3d.teachers.base import PACKAGED
from sds3d.teachers.hf import loading
from sds3d.typed import build, convert, keys, merge, nearest, plain


def load(
    prompt: str | None,
    *layers: Mapping[str, Any],
    file: str | Path | None = None,
    kind: type[RunConfig] | None = None,
) -> Any:
    """The config of a run: a ``Config``, a ``PaintConfig`` or a ``DistillConfig``.

    Args:
        prompt: what to make; None takes it from the layers (a run's config.yaml has one).
        layers: nested or dotted keys, later ones win.
        file: a YAML file under the layers, over the recipe; or the name of one of those for single models: if, sd3.
        kind: which; None takes a PaintConfig where there are settings of an image, a DistillConfig where there are
            some of a generator, else a Config.

    Raises:
        ValueError: unknown keys, wrong types, values nobody can use, a file that is missing or is no YAML.
    """
    given = _of_file(Path(file), kind) if file is not None else {}
    for layer in map(_nested, [given, *layers]):
        given = (
            merge(given, layer) if _same_method(given, layer) else {**merge(given, layer), "method": layer["method"]}
        )
    if prompt is not None:
        given["prompt"] = literal(prompt)
    kind = kind or (PaintConfig if "image" in given else DistillConfig if "generator" in given else Config)
    if kind is DistillConfig:
        given.setdefault("prompt", "")
    if "prompt" not in given:
        raise ValueError('there is no prompt; say what to make, as in: sds3d generate "a red mug"')
    real = Path(str(given.get("real") or "")).expanduser()
    if real != Path() and real.is_dir():  # so that resume works from any folder
        given["real"] = str(real.resolve())
    if given.get("method") is None:  # null is the default
        given.pop("method", None)
    for section, key in (
        ("teacher", "name"),
        ("source", "run"),
        ("image", "start"),
        ("generator", "prompts"),
        ("pairs", "folder"),
    ):
        given |= _from_anywhere(given, section, key)
    method = given.get("method") or {}
    name = method.get("name", default_method(kind)) if isinstance(method, Mapping) else str(method)
    if name not in METHODS:
        raise ValueError(f"method is {name!r}; {nearest(str(name), METHODS)} (there is {', '.join(METHODS)})")
    defaults = plain(kind("a red mug"))  # whole, so that a recipe that sets optim.lr.grid keeps optim.lr.mlp
    del defaults["prompt"], defaults["method"]
    defaults["time"]["steps"] = "${steps}"
    if kind is PaintConfig:
        defaults["optim"]["lr"]["pixels"] = ["${part:0.5}", 0.05, 0.005, "${steps}"]
    if kind is DistillConfig:
        defaults["optim"]["lr"]["generator"] = ["${part:0.5}", 2e-4, 0, "${steps}"]
    teacher = given.get("teacher")
    pipeline = isinstance(teacher, Mapping) and loading.is_pipeline(str(teacher.get("name") or ""))
    return _typed(_resolved(merge(merge(defaults, recipe(name, kind, pipeline)), given)), name, kind)


def default_method(kind: type[RunConfig]) -> str:
    """The name of the method of a run that names none."""
    return "diffinstruct" if kind is DistillConfig else "sds"


def _from_anywhere(given: Mapping[str, Any], section: str, key: str) -> dict[str, Any]:
    """The section, whose path is made absolute where it leads somewhere, so that resume works from any folder."""
    values = given.get(section)
    path = Path(str(values.get(key) or "")).expanduser() if isinstance(values, Mapping) else Path()
    as_it_is = path == Path() or str(path) in PACKAGED or not path.exists()
    return {} if as_it_is else {section: {**values, key: str(path.resolve())}}


def _typed(values: dict[str, Any], name: str, kind: type[RunConfig]) -> RunConfig:
    """Check and convert a merged tree."""
    fields = dict(values.pop("method", {}))
    fields.pop("name", None)
    known = [*keys(kind), "method.name", *keys(METHODS[name], "method")]
    return build(kind, {**values, "method": build(METHODS[name], fields, "method", known)}, known=known)


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """``key=value`` texts as a nested mapping. Raises ValueError.

    The value of a setting whose type is text (``text_keys``) is taken as it is written. Other values are read as YAML.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    layer: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or key != key.strip():
            raise ValueError(f"{text!r} is no key=value; write settings as steps=800, and the prompt in quotes")
        if key in text_keys():
            layer = merge(layer, _nested({key: literal(value)}))
            continue
        try:
            node = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
        except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
            raise ValueError(f"cannot read {text!r}; give key=value with a value in YAML") from error
        layer = merge(layer, _nested(node))
    return layer


@functools.cache
def text_keys() -> frozenset[str]:
    """Dotted names of the settings whose type is text, of every kind of run."""

    def of(cls: type, above: str = "") -> set[str]:
        found: set[str] = set()
        for name, kind in typing.get_type_hints(cls).items():
            if dataclasses.is_dataclass(kind):
                found |= of(kind, f"{above}{name}.")
            elif kind is str:
                found.add(above + name)
        return found

    return frozenset(of(Config) | of(PaintConfig) | of(DistillConfig))


def literal(value: Any) -> Any:
    """A plain value for a layer, a tree or a text, in which no ``${...}`` is a reference."""
    if isinstance(value, Mapping):
        return {key: literal(part) for key, part in value.items()}
    if isinstance(value, list):
        return [literal(part) for part in value]
    if isinstance(value, str):  # backslashes before the brace would escape one another
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


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
    here = Path(__file__).parent
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
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        node = OmegaConf.load(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}; give a YAML file with settings") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    values = OmegaConf.to_container(node)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no settings; give lines such as steps: 800")
    return {str(k): v for k, v in values.items()}


def of_run(path: Path) -> Any:
    """What a run was made with, from its config.yaml. Raises ValueError that names the file."""
    try:
        return load(None, file=path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used; edited, or of another version of sds3d? {error}") from error


def to_yaml(config: RunConfig) -> str:
    """The config, complete, as YAML; ``load(None, file=...)`` gives the same config again."""
    from omegaconf import OmegaConf

    values = plain(config)
    values["method"] = {"name": name_of(config.method), **values["method"]}
    return OmegaConf.to_yaml(OmegaConf.create(literal(values)))


def name_of(method: Method) -> str:
    """The name in METHODS of a method."""
    return next(name for name, kind in METHODS.items() if type(method) is kind)


def _resolved(values: dict[str, Any]) -> dict[str, Any]:
    """Replace ``${...}``."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    steps = convert(int, values["steps"], "steps")
    if steps < 1:
        raise ValueError(f"steps is {steps}; give 1 or more")

    def part(share: Any) -> int:
        return round(float(share) * steps)

    OmegaConf.register_resolver("part", part, replace=True)
    stages = values.get("render", {}).get("resolution")
    try:
        found = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
        if isinstance(stages, list) and "${" in str(stages):  # parts of few steps fall on one: the last of them counts
            found["render"]["resolution"] = [list(stage) for stage in dict(found["render"]["resolution"]).items()]
        return found
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise ValueError(f"cannot resolve the settings: {str(error).splitlines()[0]}") from error


def _same_method(below: Mapping[str, Any], above: Mapping[str, Any]) -> bool:
    """Whether a layer leaves the method below it what it was: another method takes none of its settings."""
    methods = [layer.get("method") for layer in (below, above)]
    names = [method.get("name") if isinstance(method, Mapping) else None for method in methods]
    return names[1] is None or names[0] in (None, names[1])


def _nested(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys opened, dataclasses and ramps as plain values, a method's name as its settings."""
    out: dict[str, Any] = {}
    for key, value in layer.items():
        node = _nested(value) if isinstance(value, Mapping) else plain(value)
        if key == "method" and isinstance(value, str):
            node = {"name": value}
        for name in reversed(str(key).split(".")):
            node = {name: node}
        out = merge(out, node)
    return out


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
    layer = _nested(layer)
    for key in layer:
        if key not in free and not _leaves({key: layer[key]}) <= SPARING:
            raise ValueError(f"{key} cannot change on resume, only {', '.join(free)}; start a new run")
    steps = layer.get("steps", config.steps)
    if isinstance(config, DistillConfig) and steps > config.steps:
        ends = [name for name, ramp in config.optim.lr.items() if ramp(config.steps) == 0]
        if ends:
            raise ValueError(
                f"the learning rate of {ends[0]} is 0 from step {config.steps} on, so more steps would teach nothing; "
                f"start a new run with steps={steps}"
            )
    values = {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.name in layer}
    fresh = build(type(config), {"prompt": config.prompt, **merge(values, layer)})
    return dataclasses.replace(config, **{key: getattr(fresh, key) for key in layer})
