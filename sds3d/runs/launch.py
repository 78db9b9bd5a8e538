"""Starts and resumes runs: builds the parts and returns the training loop."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, overload

import torch

from sds3d.config import load as configs
from sds3d.config.load import Config, RunConfig
from sds3d.distill.core import NonFiniteGradient
from sds3d.distill.critics import TrainedCritic
from sds3d.runs import build, generator_parts, kinds, memory_savings
from sds3d.runs.folder import Run
from sds3d.runs.scene import Asset
from sds3d.runtime.device import pick_device
from sds3d.runtime.distributed import Processes, join
from sds3d.runtime.errors import Diverged
from sds3d.runtime.files import is_own
from sds3d.runtime.torch_modes import training
from sds3d.students.edited_scene import EditedScene
from sds3d.students.representation import Scene
from sds3d.teachers.base import Teacher, object_name, require_teacher
from sds3d.train import Step, make_optimiser, train


@training()
def check(config: RunConfig, teacher: Teacher | None = None) -> RunConfig:
    """Build the parts of a run without starting it. Raises ValueError if it could not run.

    Returns:
        The config that the run's config.yaml would hold: without what the teacher cannot do.
    """
    parts = _Parts(build.with_teacher(config, teacher), teacher=teacher)
    parts.begin_from_source()
    make_optimiser(parts.student, config.optim)
    return parts.config


@overload
def start(config: Config, teacher: Teacher | None = None) -> tuple[Asset, Generator[Step]]: ...
@overload
def start(config: RunConfig, teacher: Teacher | None = None) -> tuple[kinds.Result, Generator[Step]]: ...
@training()
def start(config: RunConfig, teacher: Teacher | None = None) -> tuple[kinds.Result, Generator[Step]]:
    """Build a new run. Returns its result, and the loop, not yet begun. The folder is made last, after all checks.

    Args:
        teacher: an object, in place of the teacher that the config names; the run's config.yaml then names its class.

    Raises:
        ValueError: the teacher does not know the prompt, weights are missing, the method lacks something that it
            needs, or the folder cannot be written.
    """
    config = build.with_teacher(config, teacher)
    parts = _Parts(config, processes_of(config), teacher)
    parts.begin_from_source()
    title, first = parts.kind.title(config), parts.processes.rank == 0
    run = Run.create(config.out, title, configs.to_yaml(parts.config)) if first else None
    result = parts.result(run)
    try:
        steps = parts.steps(result)
        return result, steps if run is None else _locked(steps, run, run.lock(), fresh=True)
    except ValueError:
        if run is not None:
            run.discard()
        raise


@training()
def resume(
    path: str | Path, layer: Mapping[str, Any] | None = None, teacher: Teacher | None = None
) -> tuple[kinds.Result, Generator[Step]]:
    """Resume a run from its checkpoint, or from the beginning if it has none yet.

    A run that was made on a GPU goes on without one, with a warning, where there is none; its config.yaml does not
    change. The run is locked until the loop ends. The config.yaml may be a stranger's, so nothing is written outside
    the run folder to a path that only this file names.

    Args:
        path: the run folder.
        layer: settings to change: steps, device, backend, fsdp, log, export.
        teacher: the teacher of a run that was started with an object.

    Returns:
        The result, which the loop trains, and the loop: a generator of steps.

    Raises:
        ValueError: the run or its checkpoint is missing or damaged, another process works on it, it has done more
            steps than ``steps``, or the teacher is not the run's.
    """
    run = Run.open(path)
    config = configs.changed(configs.of_run(run.config), layer or {})
    if teacher is not None:
        require_teacher(teacher)
        own = (config.teacher.name, config.teacher.views)
        if own != (object_name(teacher), teacher.views):
            raise ValueError(
                f"the run's teacher is {own[0]} with views={own[1]}, and {object_name(teacher)} with "
                f"views={teacher.views} is given: give one of the same class and views, or none if the run's has a name"
            )
    here = build.usable_here(config, layer or {})
    processes = processes_of(here)
    with ExitStack() as stack:
        lock = stack.enter_context(run.lock()) if processes.rank == 0 else None
        if lock is not None:
            run.sweep()
        safe = _own_cache(here)
        for _ in prepare(safe, run.path.parent):
            pass
        parts = _Parts(safe, processes, teacher)
        result = parts.result(run)
        begun = _is_begun(run, config)
        if not begun:
            parts.begin_from_source()
        steps = parts.steps(result, resume=begun)
        if lock is not None:
            if not begun:
                run.rewind(0)
            if layer:
                run.write_text(run.config, configs.to_yaml(config))
            steps = _locked(steps, run, lock)
        stack.pop_all()
    return result, steps


def _is_begun(run: Run, config: RunConfig) -> bool:
    """Whether a run has a checkpoint to resume from. Raises ValueError if one was written and is gone."""
    rows = run.rows()
    if not run.checkpoint.is_file() and rows and rows[-1]["step"] >= config.log.save_every:
        raise ValueError(
            f"{run.path} has done {rows[-1]['step']} steps, and its checkpoint.safetensors is gone: put it back, or "
            f"start again with --config {run.config}"
        )
    return run.checkpoint.is_file()


def _own_cache(config: RunConfig) -> RunConfig:
    """The config with the default cache of prompts if its own is not an existing cache.

    A stranger's config.yaml must not make this process write into a folder of its choice.
    """
    if not config.teacher.hf.cache:
        return config
    cache = Path(config.teacher.hf.cache).expanduser()
    if cache.is_dir() and all(re.fullmatch(r"[0-9a-f]{40}\.safetensors", name) for name in os.listdir(cache)):
        return config
    warnings.warn(f"teacher.hf.cache is {cache}, which is no cache of prompts; using the usual one", stacklevel=3)
    return replace(config, teacher=replace(config.teacher, hf=replace(config.teacher.hf, cache="")))


def _locked(steps: Generator[Step], run: Run, lock: TextIO, fresh: bool = False) -> Generator[Step]:
    """The steps, after which the run's lock is released.

    If training diverges, the error says what is saved. A new run that fails in its first step leaves no folder.
    """
    try:
        yield from steps
    except (ArithmeticError, RuntimeError, ValueError, OSError, LookupError, TypeError, AttributeError) as error:
        advice = _after_divergence(run)
        if fresh and not (run.rows() or run.checkpoint.is_file()):
            run.discard()
        if isinstance(error, Diverged | NonFiniteGradient):
            raise Diverged(f"{error}. {advice}") from error
        raise
    finally:
        lock.close()


def _after_divergence(run: Run) -> str:
    """What is saved of a run that diverged, and what to do."""
    if not run.checkpoint.is_file():
        return "Nothing was saved yet: begin again"
    return f"{run.checkpoint} was saved before and is intact: look at it with sds3d view {run.path}, begin a new run"


class _Parts:
    """The parts of a run, built from its config. Raises ValueError if something is missing."""

    def __init__(self, config: RunConfig, processes: Processes = Processes(), teacher: Teacher | None = None):
        self.processes, self.kind = processes, kinds.of(config)
        self.teacher = build.build_teacher(config, teacher)
        self.config = config = self.kind.for_teacher(config, self.teacher)
        self.student = build.build_student(config, self.teacher, processes)
        self.critic = build.build_critic(config, self.teacher, processes)
        self.objective = build.build_objective(config, self.teacher, self.critic)
        self.source: Scene | None = None
        if self.kind.seen_by_cameras and config.source.run:
            self.source = Asset.open(config.source.run, config.device, getattr(config, "backend", "auto")).scene
        if "source" in config.method.NEEDS and not self.kind.has_source(config):
            raise ValueError(
                f"{type(config.method).__name__} edits, and needs a source: give {self.kind.source} and source.prompt"
            )

    def begin_from_source(self) -> None:
        """Load the source into the student if the run edits a scene."""
        if self.source is None:
            return
        try:
            self.student.load_state_dict(self.source.state_dict())
        except (RuntimeError, KeyError) as error:
            raise ValueError(
                f"the scene of source.run={self.config.source.run} has other sizes or parts: set field, occupancy and "
                "render.background as it has, and leave method.particles at 1"
            ) from error

    def result(self, run: Run | None) -> kinds.Result:
        """The result of the run, which training will change."""
        result: Any = self.kind.result
        return result(run, self.config, self.student)

    def steps(self, result: kinds.Result, resume: bool = False) -> Generator[Step]:
        """The training loop."""
        student = self.student
        if self.source is not None:
            assert isinstance(student, Scene), student
            student = EditedScene(student, self.source)
        steps = train(
            student,
            build.build_objectives(self.objective, self.config, self.student, self.processes),
            self.config.plan(),
            result.run,
            resume=resume,
            picture=result.picture,
            companions={"critic": self.critic} if self.critic else {},
            processes=self.processes,
        )
        return _guarded(self._with_adapter(steps, result.run), self.config, result.run, self.teacher)

    def _with_adapter(self, steps: Generator[Step], run: Run | None) -> Generator[Step]:
        """The steps; after the last, the critic's LoRA, if it has one, is saved in diffusers' format."""
        yield from steps
        if isinstance(self.critic, TrainedCritic) and run is not None and self.processes.rank == 0:
            self.critic.save_adapter(run.path)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """A context in which a GPU uses deterministic algorithms; a CPU always does. Restores the setting at its end."""
    before = torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
        torch.use_deterministic_algorithms(True, warn_only=True)  # a warning names operations that are not
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _guarded(steps: Generator[Step], config: RunConfig, run: Run | None, teacher: Teacher) -> Generator[Step]:
    """The steps; running out of memory becomes a ValueError.

    Its message names settings to change, the most effective first, and how to go on from the last checkpoint.
    """
    try:
        with repeatable(pick_device(config.device)) if config.deterministic else nullcontext():
            yield from steps
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        settings, advice = _memory_advice(config, teacher)
        device, saved = pick_device(config.device), _saved(run, settings)
        raise ValueError(f"out of memory on {device}; {advice}, in this order. {saved}{error}") from error


def _memory_advice(config: RunConfig, teacher: Teacher) -> tuple[list[str], str]:
    """The settings, as KEY=VALUE, with which the run can be resumed, and a sentence that names all that help most."""
    kind = kinds.of(config)
    if memory_savings.is_pipeline(config.teacher):
        savings = kind.savings(config, teacher.image_size)[:3]
        return [saving.setting for saving in savings if saving.resumable], f"set {', '.join(map(str, savings))}"
    return kind.usual_savings(config)


def _saved(run: Run | None, settings: list[str]) -> str:
    """A sentence with the path of the last checkpoint and the command that resumes from it with these settings."""
    if run is None:
        return ""
    if not run.checkpoint.is_file():
        return "Nothing was saved yet: begin again with them. "
    command = " ".join(["sds3d resume", str(run.path), *settings])
    condition = "" if settings else " where there is more memory, since they make another run"
    return f"The checkpoint {run.checkpoint} is safe: go on with {command}{condition}. "


def processes_of(config: RunConfig) -> Processes:
    """Join the processes that torchrun started. Raises ValueError if this kind of run trains in one process only."""
    many = kinds.of(config).many_processes
    processes = join(many and getattr(config, "fsdp", False))
    if processes.world_size > 1 and not many:
        raise ValueError("torchrun starts several processes, and only sds3d distill supports that; start it without")
    return processes


def prepare(config: RunConfig, home: Path | None = None) -> Iterator[int]:
    """Make the pairs of a regression, if the method needs them, before the run begins.

    Args:
        home: if given, new pairs are made only in this folder, or in one that holds pairs already.

    Yields:
        The number of pairs made so far.

    Raises:
        ValueError: see `sds3d.distill.pairs.make`; or the pairs would be made outside ``home``.
    """
    if "pairs" in config.method.NEEDS and "pairs" in kinds.of(config).gives:
        processes = processes_of(config)
        if processes.rank == 0:
            teacher: Any = build.build_teacher(config)  # has a name: the kind opens with its teacher
            distilled: Any = config  # a DistillConfig: only generators give pairs
            folder = generator_parts.pairs_folder(distilled, teacher)
            if home is not None and not (is_own(folder, home) or (folder / "pairs.json").is_file()):
                raise ValueError(
                    f"the run's pairs are gone from {folder}, and resume makes new ones in {home} only: restore them"
                )
            yield from generator_parts.make_pairs(distilled, teacher)
        processes.barrier()
