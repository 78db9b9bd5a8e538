"""Builds the parts of a run from its config: teacher, student, critic, objectives.

What differs between kinds of runs is in `sds3d.runs.kinds`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from sds3d import ops
from sds3d.config.load import leaves
from sds3d.config.schema import RunConfig
from sds3d.distill.core import ScoreMethod, ScoreObjective
from sds3d.distill.critics import Trainable, TrainedCritic
from sds3d.distill.score.bridge import Bridge
from sds3d.runs import kinds
from sds3d.runtime.device import pick_device
from sds3d.runtime.distributed import Processes
from sds3d.students.base import Student
from sds3d.teachers.base import Teacher, TeacherConfig, answerer, domains_of, object_name, require_teacher
from sds3d.teachers.by_domain import ByDomain
from sds3d.teachers.load import load_by_domain, load_teacher
from sds3d.train import Objective

AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


def usable_here(config: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """Return the config with a device and a backend that this machine has.

    The run may have been made on another machine. A device or backend that is missing here is replaced, with a
    warning, unless the user asks for it now.

    Args:
        given: the settings that the user gives now, by key.

    Raises:
        ValueError: the user gives a device that this machine does not have.
    """
    try:
        device = pick_device(config.device)
    except ValueError:
        if "device" in given:
            raise
        device = pick_device("auto")
        warnings.warn(
            f"the run was made with device={config.device}, which this machine does not have: it goes on with "
            f"device={device}",
            stacklevel=4,  # past the decorator of launch.resume
        )
        config = dataclasses.replace(config, device=str(device))
    backend = getattr(config, "backend", "auto")  # only scenes have a backend
    if backend != "auto" and "backend" not in given:
        try:
            ops.choose(device, backend)
        except ValueError:
            usable = ops.choose(device).name
            warnings.warn(
                f"the run was made with backend={backend}, which cannot run on {device} here: it goes on with "
                f"backend={usable}",
                stacklevel=4,  # past the decorator of launch.resume
            )
            config = dataclasses.replace(config, backend="auto")
    return config


def with_teacher(config: AnyConfig, teacher: Teacher | None) -> AnyConfig:
    """Return the config of a run whose teacher is an object: ``teacher.name`` names its class. None changes nothing.

    Raises:
        ValueError: the config has settings of another teacher, or this kind of run needs a teacher with a name.
    """
    if teacher is None:
        return config
    require_teacher(teacher)
    settings = TeacherConfig(object_name(teacher), teacher.views)
    if kinds.of(config).opens_with_teacher:
        raise ValueError(
            f"the teacher is an object ({settings.short_name}), and a generator's run is opened with its teacher, by "
            "its name: give a name, as in teacher='digits', or the folder of a training"
        )
    if config.teacher.name != settings.name:
        default = type(config)("a red mug").teacher
        for field in dataclasses.fields(default):
            value = getattr(config.teacher, field.name)
            if value not in (getattr(default, field.name), getattr(settings, field.name)):
                raise ValueError(
                    f"teacher.{field.name} is {value!r}, and the teacher is an object ({settings.short_name}), which "
                    "has its own settings: leave one of the two out"
                )
    return dataclasses.replace(config, teacher=settings)


def refuse_settings_of_teacher(*layers: Mapping[str, Any]) -> None:
    """Raise ValueError if settings are about a teacher; for runs whose teacher is an object."""
    for key in sorted(key for layer in layers for key in leaves(layer) if key.split(".")[0] == "teacher"):
        raise ValueError(f"{key} is for a teacher that is loaded by its name, and an object is given: leave one out")


def build_teacher(config: RunConfig, teacher: Teacher | None = None) -> Teacher:
    """Load the config's teacher, or check the given one. Raises ValueError if it does not know the run's prompts."""
    kind = kinds.of(config)
    kind.check(config)
    if teacher is None:
        load = load_by_domain if kind.has_domains else load_teacher
        teacher = load(config.teacher, config.device)
    kind.check_teacher(config, teacher)
    both = f"{config.prompt}, {config.negative}" if isinstance(config.method, Bridge) and config.negative else ""
    for name, prompt in (
        ("", config.prompt),
        ("negative: ", config.negative),
        ("source.prompt: ", config.source.prompt),
        ("prompt and negative together: ", both),
        *kind.further_prompts(config),
    ):
        if prompt or not (name or kind.many_prompts):
            try:
                teacher.check(prompt)
            except ValueError as error:
                raise ValueError(f"{name}{error}") from error
    return teacher


def build_student(config: RunConfig, teacher: Teacher | None = None, processes: Processes = Processes()) -> Student:
    """Build the student that a run trains. The same seed builds the same student.

    Args:
        teacher: a generator starts from it; scenes and images do not need it.

    Raises:
        ValueError: the picture to begin from cannot be read, or the background is unknown.
    """
    return kinds.of(config).build_student(config, teacher, processes)


def build_critic(config: RunConfig, teacher: Teacher, processes: Processes = Processes()) -> TrainedCritic | None:
    """Build a critic that starts from the teacher, with a discriminator where the method needs one.

    Where a scene shows its surface, it starts from the teacher that answers for this, which knows colours, too.

    Returns:
        The critic; None where the method needs none.

    Raises:
        ValueError: the method is not for this kind of run, the teacher has no network that a critic could start from,
            or the discriminator has no real images.
    """
    require_kind(config)
    if "critic" not in config.method.NEEDS:
        return None
    if isinstance(teacher, ByDomain):
        raise ValueError(
            f"{type(config.method).__name__} trains a critic in the space and words of one teacher, and "
            "teacher.normals lets a second one answer: take a method without a critic, or leave teacher.normals out"
        )
    shown = kinds.of(config).shown(config)
    teacher = answerer(teacher, shown[-1])
    if unknown := [name for name in shown if name not in domains_of(teacher)]:
        raise ValueError(
            f"{type(config.method).__name__} trains a critic that starts from the teacher of {shown[-1]}, which does "
            f"not know {', '.join(unknown)}: take a method without a critic, or give domains.{shown[-1]}=0"
        )
    if not isinstance(teacher, Trainable):
        raise ValueError(
            f"{type(config.method).__name__} trains a critic that starts from the teacher's network, and "
            f"{type(teacher).__name__} has none (network, extra_width, answer): take a method without a critic"
        )
    rng = torch.Generator().manual_seed(config.seed)
    return kinds.of(config).build_critic(config, teacher, rng, processes)


def require_kind(config: RunConfig) -> None:
    """Raise ValueError where the method trains only generators and the run trains something else."""
    missing = set(config.method.NEEDS) & {"pairs", "real"} - kinds.of(config).gives
    for need in missing:
        raise ValueError(f"{type(config.method).__name__} needs {need}: it trains generators, with sds3d distill")


def build_objective(config: RunConfig, teacher: Teacher, critic: TrainedCritic | None = None) -> ScoreObjective | None:
    """Bind a score method to its teacher and critic. Returns None for a method of another family.

    Raises:
        ValueError: the method lacks something that it needs.
    """
    if not isinstance(config.method, ScoreMethod):
        return None
    if config.guidance.perp_neg and (teacher.views != "words" or not kinds.of(config).seen_by_cameras):
        raise ValueError("guidance.perp_neg works through a scene's view words: set teacher.views=words, or leave it 0")
    return ScoreObjective(
        teacher=teacher,
        method=config.method,
        time=config.time,
        weight=config.weight,
        negative=config.negative,
        uncond_camera=config.uncond_camera,
        noise=config.noise,
        guidance=config.guidance,
        critic=critic,
        source_prompt=config.source.prompt,
        surface_scale=kinds.of(config).surface_scale(config),
        surface_time=kinds.of(config).surface_time(config),
        noise_seed=config.seed,
    )


def build_objectives(
    score: ScoreObjective | None, config: RunConfig, student: Student, processes: Processes = Processes()
) -> dict[str, Objective]:
    """Return the run's objectives by name: the score, if any, and the further ones of its kind."""
    objectives: dict[str, Objective] = {} if score is None else {score.name: score}
    return {**objectives, **kinds.of(config).further_objectives(score, config, student, processes)}
