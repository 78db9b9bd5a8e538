"""What a run is built of, from its config: teacher, student, critic, objectives. What differs is in `kinds`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from sds3d import ops
from sds3d.config.schema import RunConfig
from sds3d.distill.core import ScoreMethod, ScoreObjective
from sds3d.distill.critics import Trainable, TrainedCritic
from sds3d.distill.score.bridge import Bridge
from sds3d.runs import kinds
from sds3d.runtime.device import pick_device
from sds3d.runtime.distributed import Processes
from sds3d.students.base import Student
from sds3d.teachers.base import Teacher, TeacherConfig, object_name
from sds3d.teachers.load import load_teacher
from sds3d.train import Objective

AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


def usable_here(config: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """The config of a run that may have been made on another machine, with a device and kernels that are on this one.
    What it had and is not here is replaced, with a warning, unless the user gives it now.

    Args:
        given: what the user gives, by key.

    Raises:
        ValueError: the user gives a device that is not here.
    """
    try:
        device = pick_device(config.device)
    except ValueError:
        if "device" in given:
            raise
        device = pick_device("auto")
        warnings.warn(
            f"the run was made with device={config.device}, which is not here: it goes on with device={device}",
            stacklevel=4,  # past the decorator of launch.resume
        )
        config = dataclasses.replace(config, device=str(device))
    backend = getattr(config, "backend", "auto")  # which runs without a scene do not have
    if backend != "auto" and "backend" not in given:
        try:
            ops.choose(device, backend)
        except ValueError:
            found = ops.choose(device).name
            warnings.warn(
                f"the run was made with backend={backend}, which cannot run on {device} here: it goes on with "
                f"backend={found}",
                stacklevel=4,  # past the decorator of launch.resume
            )
            config = dataclasses.replace(config, backend="auto")
    return config


def with_teacher(config: AnyConfig, teacher: Teacher | None) -> AnyConfig:
    """The config of a run whose teacher is an object, where one is given: ``teacher.name`` is its class.

    Raises:
        ValueError: the config has settings of another teacher; or this kind of run needs one that has a name.
    """
    if teacher is None:
        return config
    own = TeacherConfig(object_name(teacher), teacher.views)
    if kinds.of(config).opens_with_teacher:
        raise ValueError(
            f"the teacher is an object ({own.name}), and a generator's run is opened with its teacher, by name: "
            "give a name, as in teacher='digits', or the folder of a training"
        )
    if config.teacher.name != own.name:
        usual = type(config)("a red mug").teacher
        for field in dataclasses.fields(usual):
            value = getattr(config.teacher, field.name)
            if value not in (getattr(usual, field.name), getattr(own, field.name)):
                raise ValueError(
                    f"teacher.{field.name} is {value!r}, and the teacher is an object ({own.name}), which has its own "
                    "settings: leave one of the two out"
                )
    return dataclasses.replace(config, teacher=own)


def refuse_settings_of_teacher(*layers: Mapping[str, Any]) -> None:
    """Raises ValueError where settings name a teacher, for a run whose teacher is an object."""
    for key in (key for layer in layers for key in layer if key.split(".")[0] == "teacher"):
        raise ValueError(f"{key} is for a teacher that is loaded by its name, and an object is given: leave one out")


def build_teacher(config: RunConfig, teacher: Teacher | None = None) -> Teacher:
    """The config's teacher, or the one that is given, which must know the config's prompts. Raises ValueError."""
    kind = kinds.of(config)
    kind.check(config)
    if teacher is None:
        teacher = load_teacher(config.teacher, config.device)
    kind.check_teacher(config, teacher)
    spoilt = f"{config.prompt}, {config.negative}" if isinstance(config.method, Bridge) and config.negative else ""
    for name, prompt in (
        ("", config.prompt),
        ("negative: ", config.negative),
        ("source.prompt: ", config.source.prompt),
        ("prompt and negative together: ", spoilt),
        *kind.further_prompts(config),
    ):
        if prompt or not (name or kind.many_prompts):
            try:
                teacher.check(prompt)
            except ValueError as error:
                raise ValueError(f"{name}{error}") from error
    return teacher


def build_student(config: RunConfig, teacher: Teacher | None = None, processes: Processes = Processes()) -> Student:
    """What a run trains, new; the same seed gives the same one. A generator starts from its teacher.

    Raises:
        ValueError: a picture to begin from that cannot be read, a background that is not known.
    """
    return kinds.of(config).build_student(config, teacher, processes)


def build_critic(config: RunConfig, teacher: Teacher, processes: Processes = Processes()) -> TrainedCritic | None:
    """A critic that starts from the teacher, where the method needs one; a discriminator in it, where it needs that.

    Raises:
        ValueError: the method is not for this kind of run, the teacher has no network that a critic could start from,
            or there are no real images for a discriminator.
    """
    require_kind(config)
    if "critic" not in config.method.NEEDS:
        return None
    if not isinstance(teacher, Trainable):
        raise ValueError(
            f"{type(config.method).__name__} trains a critic that starts from the teacher's network, and "
            f"{type(teacher).__name__} has none (network, extra_width, answer): take a method without a critic"
        )
    rng = torch.Generator().manual_seed(config.seed)
    return kinds.of(config).build_critic(config, teacher, rng, processes)


def require_kind(config: RunConfig) -> None:
    """Raises ValueError where the method trains generators only, and the run is none of a generator."""
    missing = set(config.method.NEEDS) & {"pairs", "real"} - kinds.of(config).gives
    for need in missing:
        raise ValueError(f"{type(config.method).__name__} needs {need}: it trains generators, with sds3d distill")


def build_objective(config: RunConfig, teacher: Teacher, critic: TrainedCritic | None = None) -> ScoreObjective | None:
    """A score method, bound to its teacher and critic; None for a method of another family. Raises ValueError where it
    lacks what it needs."""
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
        noise_seed=config.seed,
    )


def build_objectives(
    score: ScoreObjective | None, config: RunConfig, student: Student, processes: Processes = Processes()
) -> dict[str, Objective]:
    """The method's objectives by name: its score, where it has one, and what its kind of run has beside it."""
    own: dict[str, Objective] = {} if score is None else {score.name: score}
    return {**own, **kinds.of(config).further_objectives(score, config, student, processes)}
