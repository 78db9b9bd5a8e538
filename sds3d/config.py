"""What a user can set: one typed tree, its YAML, recipes and ``key=value`` overrides. make.py builds from it.

Layers, each over the one before: the defaults of the dataclasses, the method's recipe (``configs/<method>.yaml``),
a user's file, keyword arguments or flags, ``key=value``. ``${steps}`` and ``${part:0.75}`` (that part of the steps,
rounded) may stand in any value, so that a recipe's ramps follow the number of steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sds3d import ops
from sds3d.cameras import CameraRanges
from sds3d.critics import CriticConfig
from sds3d.distill import METHODS
from sds3d.guidance import Guidance
from sds3d.ramp import Ramp
from sds3d.scenes.field import FieldConfig
from sds3d.scenes.image import ImageConfig
from sds3d.scenes.occupancy import OccupancyConfig
from sds3d.scenes.regularisers import RegulariserConfig
from sds3d.scenes.student import RenderConfig
from sds3d.teachers.base import TeacherConfig
from sds3d.times import TimeDraw
from sds3d.train import OptimConfig, Plan
from sds3d.typed import build, convert, keys, merge, nearest, plain

PACKAGED_TEACHERS = ("small",)
DEFAULT_METHOD = "sds"


@dataclass(frozen=True)
class LogConfig:
    """
    Args:
        save_every: steps between checkpoints.
        picture_every: steps between progress pictures, 0 for none.
    """

    save_every: int = 100
    picture_every: int = 50


@dataclass(frozen=True)
class ExportConfig:
    """
    Args:
        mesh_resolution: voxels along each side of the box.
        threshold: density at the surface; null chooses it.
        keep: pieces smaller than this share of the largest piece's area are dropped.
        frames, size, elevation: of the turntable; pixels, degrees. ``size`` is the preview's, too.
    """

    mesh_resolution: int = 96
    threshold: float | None = None
    keep: float = 0.05
    frames: int = 48
    size: int = 128
    elevation: float = 15.0

    def __post_init__(self):
        if not 8 <= self.mesh_resolution <= 512:
            raise ValueError(f"export.mesh_resolution is {self.mesh_resolution}; give 8 to 512 voxels a side")
        if self.threshold is not None and not self.threshold > 0:
            raise ValueError(f"export.threshold is {self.threshold}; give a density above 0, or null")
        if not 0 <= self.keep <= 1:
            raise ValueError(f"export.keep is {self.keep}; give a share from 0 to 1")
        if not -90 <= self.elevation <= 90:
            raise ValueError(f"export.elevation is {self.elevation}; give degrees from -90 to 90")
        if not 2 <= self.frames <= 10_000:
            raise ValueError(f"export.frames is {self.frames}; give 2 to 10000")
        if not 16 <= self.size <= 2048 or self.size % 2:
            raise ValueError(f"export.size is {self.size}; give an even number from 16 to 2048")


@dataclass(frozen=True)
class SourceConfig:
    """What an edit starts from.

    Args:
        prompt: what the source shows.
        run: the run folder of a scene to edit; images begin from image.start.
    """

    prompt: str = ""
    run: str = ""


@dataclass(frozen=True)
class RunConfig:
    """What every run is told, whatever its student.

    Args:
        prompt: what to make.
        negative: what not to make; "" for nothing.
        seed: of every random draw.
        steps: of the loop.
        device: "auto", "cpu", "cuda" ...
        deterministic: on a GPU, make the same run the same bit for bit, which costs time (a warning names what cannot
            be); on a CPU it always is.
        out: folder for run folders.
        method: a method of distill.METHODS; in YAML its name and its fields.
        weight: W(t), one of noise.WEIGHTS; "auto" is the method's own.
        uncond_camera: whether the null and negative prompts are told the camera.
        noise: "fresh" every step, or "fixed", the same for every step (some methods find their own, by inversion).
        guidance: Perp-Neg and CFG rescale, beside the method's own scale.
        time: where t comes from.
        critic: how the student's own score is learnt, for methods that need it.
        source: what is edited, for methods that edit.

    Raises:
        ValueError: an empty prompt or a number that makes no sense.
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 400
    device: str = "auto"
    deterministic: bool = False
    out: str = "outputs"
    teacher: TeacherConfig = TeacherConfig()
    method: Any = METHODS[DEFAULT_METHOD]()
    weight: str = "auto"
    uncond_camera: bool = False
    noise: str = "fresh"
    guidance: Guidance = Guidance()
    critic: CriticConfig = CriticConfig()
    source: SourceConfig = SourceConfig()
    time: TimeDraw = dataclasses.field(default_factory=lambda: TimeDraw(Ramp.constant(0.087), Ramp(0, 0.951, 0.5, 300)))
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    log: LogConfig = LogConfig()

    def __post_init__(self):
        if not self.prompt.strip():
            raise ValueError('the prompt is empty; say what to make, as in: sds3d generate "a red mug"')
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed is {self.seed}; give 0 or more")
        self.plan()

    def plan(self) -> Plan:
        """What the loop is told."""
        return Plan(self.steps, 2 * self.seed, {}, self.optim, self.log.save_every, self.log.picture_every)

    @property
    def particles(self) -> int:
        """Students that share the method's critic."""
        return getattr(self.method, "particles", 1)


@dataclass(frozen=True)
class Config(RunConfig):
    """Everything that makes a scene.

    Args:
        backend: of the hot kernels; one of ops.BACKENDS.
    """

    backend: str = "auto"
    field: FieldConfig = FieldConfig()
    occupancy: OccupancyConfig = OccupancyConfig()
    render: RenderConfig = RenderConfig()
    camera: CameraRanges = CameraRanges()
    regularise: RegulariserConfig = RegulariserConfig()
    export: ExportConfig = ExportConfig()

    def __post_init__(self):
        super().__post_init__()
        if self.backend not in ops.BACKENDS:
            raise ValueError(f"backend is {self.backend!r}; {nearest(self.backend, ops.BACKENDS)}")

    def plan(self) -> Plan:
        return dataclasses.replace(super().plan(), lambdas=self.regularise.ramps())


@dataclass(frozen=True)
class PaintConfig(RunConfig):
    """Everything that makes images without a scene."""

    steps: int = 200
    optim: OptimConfig = dataclasses.field(
        default_factory=lambda: OptimConfig({"pixels": Ramp(100, 0.05, 0.005, 200)}, eps=1e-8)
    )
    log: LogConfig = LogConfig(picture_every=25)
    image: ImageConfig = ImageConfig()

    def __post_init__(self):
        super().__post_init__()
        if self.particles > 1:
            raise ValueError("method.particles counts scenes; for images give image.count")


def load(
    prompt: str | None,
    *layers: Mapping[str, Any],
    file: str | Path | None = None,
    kind: type[RunConfig] | None = None,
) -> Any:
    """The config of a prompt: a ``Config``, or a ``PaintConfig``.

    Args:
        prompt: what to make; None takes it from the layers (a run's config.yaml has one).
        layers: nested or dotted keys, later ones win.
        file: a YAML file under the layers, over the recipe.
        kind: which; None takes a PaintConfig where there are settings of an image, else a Config.

    Raises:
        ValueError: unknown keys, wrong types, values nobody can use, a file that is missing or is no YAML.
    """
    given = read_yaml(Path(file)) if file is not None else {}
    for layer in map(_nested, [given, *layers]):
        given = (
            merge(given, layer) if _same_method(given, layer) else {**merge(given, layer), "method": layer["method"]}
        )
    if prompt is not None:
        given["prompt"] = prompt.replace("${", "\\${")
    if "prompt" not in given:
        raise ValueError('there is no prompt; say what to make, as in: sds3d generate "a red mug"')
    if given.get("method") is None:  # null is the default
        given.pop("method", None)
    for section, key in (("teacher", "name"), ("source", "run"), ("image", "start")):
        given |= _from_anywhere(given, section, key)
    method = given.get("method") or {}
    name = method.get("name", DEFAULT_METHOD) if isinstance(method, Mapping) else str(method)
    if name not in METHODS:
        raise ValueError(f"method is {name!r}; {nearest(str(name), METHODS)} (there is {', '.join(METHODS)})")
    kind = kind or (PaintConfig if "image" in given else Config)
    defaults = plain(kind("a red mug"))  # whole, so that a recipe that sets optim.lr.grid keeps optim.lr.mlp
    del defaults["prompt"], defaults["method"]
    defaults["time"]["steps"] = "${steps}"
    if kind is PaintConfig:
        defaults["optim"]["lr"]["pixels"] = ["${part:0.5}", 0.05, 0.005, "${steps}"]
    return _typed(_resolved(merge(merge(defaults, recipe(name, kind)), given)), name, kind)


def _from_anywhere(given: Mapping[str, Any], section: str, key: str) -> dict[str, Any]:
    """The section, whose path is made absolute where it leads somewhere, so that resume works from any folder."""
    values = given.get(section)
    path = Path(str(values.get(key) or "")).expanduser() if isinstance(values, Mapping) else Path()
    as_it_is = path == Path() or str(path) in PACKAGED_TEACHERS or not path.exists()
    return {} if as_it_is else {section: {**values, key: str(path.resolve())}}


def _typed(values: dict[str, Any], name: str, kind: type[RunConfig]) -> RunConfig:
    """Check and convert a merged tree."""
    fields = dict(values.pop("method", {}))
    fields.pop("name", None)
    known = [*keys(kind), "method.name", *keys(METHODS[name], "method")]
    return build(kind, {**values, "method": build(METHODS[name], fields, "method", known)}, known=known)


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """``key=value`` texts as a nested mapping; values are read as YAML. Raises ValueError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    layer: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or key != key.strip():
            raise ValueError(f"{text!r} is no key=value; write settings as steps=800, and the prompt in quotes")
        try:
            node = OmegaConf.to_container(OmegaConf.from_dotlist([text]))
        except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
            raise ValueError(f"cannot read {text!r}; give key=value with a value in YAML") from error
        layer = merge(layer, _nested(node))
    return layer


def recipe(name: str, kind: type[RunConfig] = Config) -> dict[str, Any]:
    """The recipe that ships with the package, by method name; empty where a method has none. The recipes are for
    scenes: images take from them what is not about scenes, and keep their own learning rate."""
    path = recipes_folder() / f"{name}.yaml"
    values = read_yaml(path) if path.is_file() else {}
    return values if kind is Config else {k: v for k, v in values.items() if k in _SHARED}


def recipes_folder() -> Path:
    """Where the recipes are: inside an installed package, or configs/ beside it in a clone."""
    here = Path(__file__).parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


_SHARED = {f.name for f in dataclasses.fields(RunConfig)} - {"optim", "steps", "log"}


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
    name = next(name for name, kind in METHODS.items() if type(config.method) is kind)
    values["method"] = {"name": name, **values["method"]}
    for key in ("prompt", "negative"):
        values[key] = values[key].replace("${", "\\${")
    return OmegaConf.to_yaml(OmegaConf.create(values))


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
    try:
        return OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
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


def changed(config: RunConfig, layer: Mapping[str, Any]) -> Any:
    """A run's config with what may change on resume: steps, device, backend, log.*, export.*.

    Raises:
        ValueError: another key, which would no longer be the same run.
    """
    mutable = ("steps", "device", "backend", "log", "export")
    free = [f.name for f in dataclasses.fields(config) if f.name in mutable]
    layer = _nested(layer)
    for key in layer:
        if key not in free:
            raise ValueError(f"{key} cannot change on resume, only {', '.join(free)}; start a new run with generate")
    values = {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config) if f.name in layer}
    fresh = build(type(config), {"prompt": config.prompt, **merge(values, layer)})
    return dataclasses.replace(config, **{key: getattr(fresh, key) for key in layer})
