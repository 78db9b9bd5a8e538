"""Begin a run or go on with one: student, teacher, critic, objective and loop, put together."""

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
from sds3d.runtime.modes import training
from sds3d.students.scene.edit import EditedScene
from sds3d.students.scene.student import SceneStudent
from sds3d.teachers.base import Teacher, object_name
from sds3d.train import Step, make_optimiser, train


@training()
def check(config: RunConfig, teacher: Teacher | None = None) -> None:
    """Refuse what could not run. Raises ValueError."""
    parts = _Parts(build.with_teacher(config, teacher), teacher=teacher)
    parts.begin_from_source()
    make_optimiser(parts.student, config.optim)


@overload
def start(config: Config, teacher: Teacher | None = None) -> tuple[Asset, Generator[Step]]: ...
@overload
def start(config: RunConfig, teacher: Teacher | None = None) -> tuple[kinds.Made, Generator[Step]]: ...
@training()
def start(config: RunConfig, teacher: Teacher | None = None) -> tuple[kinds.Made, Generator[Step]]:
    """A new run: its folder, and the loop, not yet begun. The folder is made once everything else is in order.

    Args:
        teacher: an object, in place of the teacher that the config names; the run's config.yaml then names its class.

    Raises:
        ValueError: the prompt is not for this teacher, weights are missing, the method lacks what it needs, the folder
            cannot be written ...
    """
    config = build.with_teacher(config, teacher)
    parts = _Parts(config, processes_of(config), teacher)
    parts.begin_from_source()
    title, first = parts.kind.title(config), parts.processes.rank == 0
    run = Run.create(config.out, title, configs.to_yaml(config)) if first else None
    made = parts.made(run)
    try:
        steps = parts.steps(made)
        return made, steps if run is None else _held(steps, run, run.lock(), fresh=True)
    except ValueError:
        if run is not None:
            run.discard()
        raise


@training()
def resume(
    path: str | Path, layer: Mapping[str, Any] | None = None, teacher: Teacher | None = None
) -> tuple[kinds.Made, Generator[Step]]:
    """A run, and the loop from its checkpoint on; from the beginning, where it ended before it had one.

    One that was made on a GPU goes on without, with a warning, where there is none; its config.yaml keeps what it says.

    The run is this process's until the loop ends. Outside the run nothing is written that its config.yaml, which may be
    a stranger's, alone names.

    Args:
        path: the run folder.
        layer: what may change: steps, device, backend, fsdp, log, export.
        teacher: the teacher of a run that was started with an object.

    Raises:
        ValueError: no such run, another process works on it, a damaged checkpoint, more steps done than asked for,
            another teacher than the run's ...
    """
    run = Run.open(path)
    config = configs.changed(configs.of_run(run.config), layer or {})
    if teacher is not None and config.teacher.name != object_name(teacher):
        raise ValueError(
            f"the run's teacher is {config.teacher.name}, and {object_name(teacher)} is given: go on with its own"
        )
    here = build.usable_here(config, layer or {})
    processes = processes_of(here)
    with ExitStack() as stack:
        held = stack.enter_context(run.lock()) if processes.rank == 0 else None
        if held is not None:
            run.sweep()
        used = _own_cache(here)
        for _ in prepare(used, run.path.parent):
            pass
        parts = _Parts(used, processes, teacher)
        made = parts.made(run)
        begun = _is_begun(run, config)
        if not begun:
            parts.begin_from_source()
        steps = parts.steps(made, resume=begun)
        if held is not None:
            if not begun:
                run.rewind(0)
            if layer:
                run.write_text(run.config, configs.to_yaml(config))
            steps = _held(steps, run, held)
        stack.pop_all()
    return made, steps


def _is_begun(run: Run, config: RunConfig) -> bool:
    """Whether a run has a checkpoint to go on from. Raises ValueError where one was written, and is gone."""
    rows = run.rows()
    if not run.checkpoint.is_file() and rows and rows[-1]["step"] >= config.log.save_every:
        raise ValueError(
            f"{run.path} has done {rows[-1]['step']} steps, and its checkpoint.safetensors is gone: put it back, or "
            f"start again with --config {run.config}"
        )
    return run.checkpoint.is_file()


def _own_cache(config: RunConfig) -> RunConfig:
    """The config with the usual cache of prompts, where it names another one that is none: a stranger's config.yaml
    must not have files written into any folder."""
    if not config.teacher.hf.cache:
        return config
    cache = Path(config.teacher.hf.cache).expanduser()
    if cache.is_dir() and all(re.fullmatch(r"[0-9a-f]{40}\.safetensors", name) for name in os.listdir(cache)):
        return config
    warnings.warn(f"teacher.hf.cache is {cache}, which is no cache of prompts; using the usual one", stacklevel=3)
    return replace(config, teacher=replace(config.teacher, hf=replace(config.teacher.hf, cache="")))


def _held(steps: Generator[Step], run: Run, held: TextIO, fresh: bool = False) -> Generator[Step]:
    """The steps, while the run's lock is held. Where they end with an error, it says what is saved; a new run that
    ended in its first step leaves no folder."""
    try:
        yield from steps
    except (ArithmeticError, RuntimeError, ValueError, OSError, LookupError, TypeError, AttributeError) as error:
        left = _left(run)
        if fresh and not (run.rows() or run.checkpoint.is_file()):
            run.discard()
        if isinstance(error, Diverged | NonFiniteGradient):
            raise Diverged(f"{error}. {left}") from error
        raise
    finally:
        held.close()


def _left(run: Run) -> str:
    """What a run that diverged has left."""
    if not run.checkpoint.is_file():
        return "Nothing was saved yet: begin again"
    return f"{run.checkpoint} is from before, and good: look at it with sds3d view {run.path}, and begin a new run"


class _Parts:
    """What a run consists of, made from its config. Raises ValueError where something is missing."""

    def __init__(self, config: RunConfig, processes: Processes = Processes(), teacher: Teacher | None = None):
        self.config, self.processes, self.kind = config, processes, kinds.of(config)
        self.teacher = build.build_teacher(config, teacher)
        self.student = build.build_student(config, self.teacher, processes)
        self.critic = build.build_critic(config, self.teacher, processes)
        self.objective = build.build_objective(config, self.teacher, self.critic)
        self.source: SceneStudent | None = None
        if self.kind.seen_by_cameras and config.source.run:
            self.source = Asset.open(config.source.run, config.device, getattr(config, "backend", "auto")).scene
        if "source" in config.method.NEEDS and not self.kind.has_source(config):
            raise ValueError(
                f"{type(config.method).__name__} edits, and needs what: give {self.kind.source} and source.prompt"
            )

    def begin_from_source(self) -> None:
        """An edited scene begins as its source."""
        if self.source is None:
            return
        try:
            self.student.load_state_dict(self.source.state_dict())
        except (RuntimeError, KeyError) as error:
            raise ValueError(
                f"the scene of source.run={self.config.source.run} has other sizes or parts: set field, occupancy and "
                "render.background as it has, and leave method.particles at 1"
            ) from error

    def made(self, run: Run | None) -> kinds.Made:
        """What the run will have made."""
        result: Any = self.kind.result  # whose config and student are of its kind
        return result(run, self.config, self.student)

    def steps(self, made: kinds.Made, resume: bool = False) -> Generator[Step]:
        """The loop."""
        student = self.student
        if self.source is not None:
            assert isinstance(student, SceneStudent), student
            student = EditedScene(student, self.source)
        steps = train(
            student,
            build.build_objectives(self.objective, self.config, self.student, self.processes),
            self.config.plan(),
            made.run,
            resume=resume,
            picture=made.picture,
            companions={"critic": self.critic} if self.critic else {},
            processes=self.processes,
        )
        return _guarded(self._with_adapter(steps, made.run), self.config, made.run, self.teacher)

    def _with_adapter(self, steps: Generator[Step], run: Run | None) -> Generator[Step]:
        """The steps; after the last, a critic that diffusers can load by itself goes into the run folder."""
        yield from steps
        if isinstance(self.critic, TrainedCritic) and run is not None and self.processes.rank == 0:
            self.critic.save_adapter(run.path)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Let a GPU use only what gives the same bits every time; a CPU does anyway. Put back as it was afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which CUDA's matrix products ask for
        torch.use_deterministic_algorithms(True, warn_only=True)  # a warning names what still cannot be repeated
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _guarded(steps: Generator[Step], config: RunConfig, run: Run | None, teacher: Teacher) -> Generator[Step]:
    """The steps; where memory ends, an error that names the settings to change, those that help most first, and says
    how to go on from the last checkpoint."""
    try:
        with repeatable(pick_device(config.device)) if config.deterministic else nullcontext():
            yield from steps
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        settings, lower = _sparing(config, teacher)
        where, saved = pick_device(config.device), _saved(run, settings)
        raise ValueError(f"out of memory on {where}; {lower}, in this order. {saved}{error}") from error


def _sparing(config: RunConfig, teacher: Teacher) -> tuple[list[str], str]:
    """Those of the three most effective settings that a run can take up where it stopped, and all three in words."""
    kind = kinds.of(config)
    if memory_savings.is_pipeline(config.teacher):
        found = kind.savings(config, teacher.image_size)[:3]
        return [one.setting for one in found if one.resumable], f"set {', '.join(map(str, found))}"
    return kind.usual_savings(config)


def _saved(run: Run | None, settings: list[str]) -> str:
    """Where the last checkpoint is, and the command that goes on from it with these settings."""
    if run is None:
        return ""
    if not run.checkpoint.is_file():
        return "Nothing was saved yet: begin again with them. "
    how = " ".join(["sds3d resume", str(run.path), *settings])
    where = "" if settings else " where there is more memory, since they make another run"
    return f"The checkpoint {run.checkpoint} is safe: go on with {how}{where}. "


def processes_of(config: RunConfig) -> Processes:
    """This process's share of a run that torchrun started. Raises ValueError where a run cannot be shared."""
    many = kinds.of(config).many_processes
    processes = join(many and getattr(config, "fsdp", False))
    if processes.world_size > 1 and not many:
        raise ValueError("torchrun starts several processes, which only sds3d distill can share; start it without")
    return processes


def prepare(config: RunConfig, home: Path | None = None) -> Iterator[int]:
    """Make what a run needs before it begins: the pairs of a regression. Yields how many are there.

    Args:
        home: the only folder in which they are made, beside one that holds such pairs already; None for any.

    Raises:
        ValueError: see `sds3d.distill.pairs.make`; or they would be made elsewhere.
    """
    if "pairs" in config.method.NEEDS and "pairs" in kinds.of(config).gives:
        processes = processes_of(config)
        if processes.rank == 0:
            own: Any = config  # of a kind that gives pairs,
            teacher: Any = build.build_teacher(config)  # from such a teacher
            folder = generator_parts.pairs_folder(own, teacher)
            if home is not None and not (is_own(folder, home) or (folder / "pairs.json").is_file()):
                raise ValueError(
                    f"the run's pairs are gone from {folder}, and resume makes new ones in {home} only: bring them back"
                )
            yield from generator_parts.make_pairs(own, teacher)
        processes.wait()
