"""The kinds of runs: a scene, images, a generator. Everything that differs between them is in the table ``KINDS``.

To add a kind, add a `Kind` to ``KINDS``: its config class, the functions that build its parts, and its result class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sds3d.config import load as configs
from sds3d.config.schema import Config, DistillConfig, PaintConfig, RunConfig
from sds3d.diffusion.timesteps import TimestepSampler
from sds3d.distill.core import ScoreObjective
from sds3d.distill.critics import TrainedCritic
from sds3d.runs import generator_parts, image_parts, report, scene_parts
from sds3d.runs.folder import Run
from sds3d.runs.generator import Generated
from sds3d.runs.image import Painting
from sds3d.runs.memory_savings import Saving
from sds3d.runs.scene import Asset
from sds3d.runtime.distributed import Processes
from sds3d.students.base import Student
from sds3d.teachers.load import Loaded
from sds3d.train import Objective

Result = Asset | Painting | Generated


def _title(config: Any) -> str:
    return config.prompt


def _nothing(*_: Any) -> None:
    pass


def _unchanged(config: Any, teacher: Any) -> Any:
    return config


def _no_prompts(config: Any) -> list[tuple[str, str]]:
    return []


def _unguided(config: Any) -> float:
    return 1.0


def _critic(config: Any, teacher: Loaded, rng: torch.Generator, processes: Processes) -> TrainedCritic:
    return TrainedCritic(teacher, config.critic, rng, processes)


def _no_objectives(
    score: ScoreObjective | None, config: Any, student: Student, processes: Processes
) -> dict[str, Objective]:
    return {}


def _colours(config: Any) -> tuple[str, ...]:
    return ("colours",)


@dataclass(frozen=True)
class Kind:
    """The record of one kind of run. Each function takes a config of the class ``config``.

    Args:
        config: the config class.
        result: the class of the finished run: ``result(run, config, student)``, and ``result.open(folder)``.
        build_student: (config, teacher, processes) -> the student.
        savings: (config, the teacher's image size in pixels) -> settings that save memory, the most effective first.
        usual_savings: (config) -> advice for a packaged teacher that runs out of memory: the settings, as KEY=VALUE,
            with which a stopped run can be resumed, and a sentence that names all settings that help.
        title: (config) -> the text that the run folder is named after.
        check: (config) -> None; raises ValueError before a teacher is loaded.
        check_teacher: (config, teacher) -> None; raises ValueError if the teacher cannot teach this kind.
        for_teacher: (config, teacher) -> the config without what this teacher cannot do.
        further_prompts: (config) -> (label, prompt) pairs that the teacher must know beside the prompt; the label
            begins the error message.
        build_critic: (config, teacher, rng, processes) -> a critic, for methods that need one.
        further_objectives: (score, config, student, processes) -> objectives beside the score, by name.
        source: how a user gives the source of an edit, as KEY=VALUE.
        has_source: (config) -> whether the config gives a source.
        surface_scale: (config) -> the guidance scale in the domains of the surface, see `sds3d.distill.query.Query`.
        surface_time: (config) -> the sampler of t in these domains; None is that of all others.
        shown: (config) -> the domains that at least one step shows.
        gives: the needs of methods that this kind can meet: "pairs", "real".
        seen_by_cameras: whether the student is rendered from cameras.
        many_prompts: whether an empty prompt means all prompts that the teacher was trained on.
        many_processes: whether several processes of torchrun can train one student.
        has_domains: whether the student can show other domains than colours.
        opens_with_teacher: whether opening a run folder loads its teacher, which must then have a name.
    """

    config: type[RunConfig]
    result: type[Asset] | type[Painting] | type[Generated]
    build_student: Callable[[Any, Any, Processes], Student]
    savings: Callable[[Any, int], list[Saving]]
    usual_savings: Callable[[Any], tuple[list[str], str]]
    title: Callable[[Any], str] = _title
    check: Callable[[Any], None] = _nothing
    check_teacher: Callable[[Any, Any], None] = _nothing
    for_teacher: Callable[[Any, Any], Any] = _unchanged
    further_prompts: Callable[[Any], list[tuple[str, str]]] = _no_prompts
    build_critic: Callable[[Any, Any, torch.Generator, Processes], TrainedCritic] = _critic
    further_objectives: Callable[[ScoreObjective | None, Any, Student, Processes], dict[str, Objective]] = (
        _no_objectives
    )
    source: str = ""
    has_source: Callable[[Any], bool] = bool
    surface_scale: Callable[[Any], float] = _unguided
    shown: Callable[[Any], tuple[str, ...]] = _colours
    surface_time: Callable[[Any], TimestepSampler | None] = _nothing
    gives: frozenset[str] = frozenset()
    seen_by_cameras: bool = False
    many_prompts: bool = False
    many_processes: bool = False
    has_domains: bool = False
    opens_with_teacher: bool = False


KINDS = {
    "scene": Kind(
        config=Config,
        result=Asset,
        build_student=scene_parts.build_student,
        savings=scene_parts.savings,
        usual_savings=scene_parts.usual_savings,
        check=scene_parts.check,
        check_teacher=scene_parts.check_teacher,
        for_teacher=scene_parts.for_teacher,
        further_prompts=scene_parts.further_prompts,
        source="source.run=outputs/00001-...",
        has_source=lambda config: bool(config.source.run),
        surface_scale=lambda config: config.domains.guidance,
        shown=lambda config: config.domains.shown(),
        surface_time=lambda config: config.domains.time(config.time),
        seen_by_cameras=True,
        has_domains=True,
    ),
    "image": Kind(
        config=PaintConfig,
        result=Painting,
        build_student=image_parts.build_student,
        savings=image_parts.savings,
        usual_savings=image_parts.usual_savings,
        source="image.start=picture.png",
        has_source=lambda config: bool(config.image.start),
    ),
    "generator": Kind(
        config=DistillConfig,
        result=Generated,
        build_student=generator_parts.build_student,
        savings=generator_parts.savings,
        usual_savings=generator_parts.usual_savings,
        title=generator_parts.title,
        check_teacher=generator_parts.check_teacher,
        build_critic=generator_parts.build_critic,
        further_objectives=generator_parts.further_objectives,
        gives=frozenset({"pairs", "real"}),
        many_prompts=True,
        many_processes=True,
        opens_with_teacher=True,
    ),
}


def of(config: RunConfig) -> Kind:
    """Return the kind of a run's config."""
    return next(kind for kind in KINDS.values() if isinstance(config, kind.config))


def open_run(path: str | Path, device: str = "auto") -> Result:
    """Load the result of a run folder from its last checkpoint. Raises ValueError; see `Asset.open`."""
    return of(configs.of_run(Run.open(path).config)).result.open(path, device)


def write_page(run: Run, note: str = "") -> Path:
    """Write a run's index.html from the files in its folder. Raises ValueError; see `report.write_page`."""
    return report.write_page(run, of(configs.of_run(run.config)).result.PAGE, note)
