"""The one loop: a student draws, objectives judge, one backward, one optimiser step. It yields a typed Step.

A GPU is told a whole step before anything is asked of it: figures and checks come back in one copy at its end.
Between two yields there is exactly one whole step, so closing the generator (Ctrl-C in the command line does
that) always leaves a consistent state, which goes into the checkpoint. Resuming repeats the same random
stream: on a CPU, with the same backend and number of threads, an interrupted run ends bit for bit where an
uninterrupted one does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sds3d.runtime import memory
from sds3d.runtime.distributed import Processes
from sds3d.runtime.errors import Diverged
from sds3d.runtime.modes import stepwise_training, training
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.transfer import Figures
from sds3d.students.base import Draw, Phased, Student
from sds3d.students.companions import Companion, DrawlessCompanion, DrawnCompanion
from sds3d.students.optim import OptimConfig, lay_out, make_optimiser


class Judged(Protocol):
    """What an objective answers: a loss to go backward from, and named figures."""

    loss: Tensor

    @property
    def metrics(self) -> Mapping[str, float | Tensor]:
        """See above."""
        ...


DrawnObjective = Callable[[Draw, int, torch.Generator], Judged]


@runtime_checkable
class DrawlessObjective(Protocol):
    """An objective that needs no draw of the student, as a regression on pairs, which asks its network itself."""

    def evaluate_without_draw(self, step: int, rng: torch.Generator) -> Judged: ...


Objective = DrawnObjective | DrawlessObjective


class RunFolder(Protocol):
    """Where the loop writes; see `sds3d.runs.folder.Run`."""

    path: Path
    checkpoint: Path

    def save_checkpoint(self, state: dict[str, Any]) -> None: ...

    def load_checkpoint(self) -> dict[str, Any]: ...

    def append(self, row: dict[str, float]) -> None: ...

    def rewind(self, step: int) -> None: ...

    def save_picture(self, step: int, views: Tensor) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What the loop is told, beside student and objectives.

    Args:
        steps: how many in all.
        seed: of every draw in the run.
        lambdas: regulariser -> its weight, a Ramp over steps; a regulariser without one is only logged.
        optim: learning rates and clipping.
        save_every: steps between checkpoints (one is always written at the end).
        picture_every: steps between progress pictures; 0 for none.
        phase_steps: steps of a phase; 0 for one phase in all. Each further phase is as a run of its own, whose teacher
            and first weights are the student's running mean: the optimiser is new, and whatever follows the steps
            counts from the phase's first. Companions go on as they are.
    """

    steps: int = 400
    seed: int = 0
    lambdas: Mapping[str, Ramp] = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    save_every: int = 100
    picture_every: int = 50
    phase_steps: int = 0

    def __post_init__(self):
        if self.phase_steps < 0:
            raise ValueError(f"phase_steps is {self.phase_steps}; give 0 (one phase in all) or more")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; give 1 or more")
        if self.save_every < 1:
            raise ValueError(f"log.save_every is {self.save_every}; give 1 or more")
        if self.picture_every < 0:
            raise ValueError(f"log.picture_every is {self.picture_every}; give 0 (no pictures) or more")

    def step_in_phase(self, done: int) -> int:
        """The step of its phase, from 0, that comes after ``done`` steps of the run."""
        return done % self.phase_steps if self.phase_steps else done


@dataclass(frozen=True)
class Step:
    """One finished step.

    Args:
        step: how many are done, 1 .. total.
        total: how many there will be.
        loss: of all objectives and weighted regularisers; for score methods its value means nothing.
        metrics: named figures, the row of metrics.jsonl.
        seconds: of training so far, earlier sessions of a resumed run included.
        picture: (B, 3, H, W) in [0, 1] where this step made a progress picture, else None.
    """

    step: int
    total: int
    loss: float
    metrics: dict[str, float]
    seconds: float
    picture: Tensor | None = None


@training()
def train(
    student: Student,
    objectives: Mapping[str, Objective],
    plan: Plan,
    run: RunFolder | None = None,
    resume: bool = False,
    picture: Callable[[], Tensor] | None = None,
    companions: Mapping[str, Companion] = MappingProxyType({}),
    processes: Processes = Processes(),
) -> Generator[Step]:
    """Train ``student``; gives an iterator that yields after every step. A checkpoint is read at once. Each step has
    gradients, also where the caller turned them off; see `sds3d.runtime.modes`.

    Args:
        student: what has the parameters.
        objectives: name -> objective; their losses are summed. The student draws where one of them needs it, and its
            regularisers, which are of a draw, count there alone.
        plan: steps, seed, weights, learning rates.
        run: where checkpoints, metrics and pictures go; None writes nothing.
        resume: go on from the run's checkpoint.
        picture: makes the views (B, 3, H, W) of a progress picture.
        companions: name -> what is trained beside the student, in this order before every step: each is fitted
            ``steps`` times, on fresh draws, or updated without. The name is that of its loss among the metrics, and of
            its settings.
        processes: of every batch, where several processes train; the first of them writes.

    Raises:
        ValueError: the disk is full, a checkpoint is missing or damaged or does not fit the student, a group
            of parameters has no learning rate, the run has done more steps than the plan has, or it has phases and the
            student has none.
        Diverged: a loss, a regulariser or a gradient is not finite.
    """
    if plan.phase_steps and (processes.sharded or not isinstance(student, Phased)):
        what = "fsdp keeps in parts" if processes.sharded else f"a {type(student).__name__} does not have"
        raise ValueError(f"a phase begins from a running mean of the weights, which {what}: leave phase_steps at 0")
    optimiser = make_optimiser(student, plan.optim)
    processes.shard_states(optimiser)
    rng = torch.Generator().manual_seed(plan.seed)
    done, seconds = 0, 0.0
    if resume:
        assert run is not None, "resume needs a run"
        done, seconds = _restore(run, student, optimiser, rng, companions)
        if done > plan.steps:
            raise ValueError(
                f"{run.path} has done {done} steps; steps={plan.steps} is less: give steps={2 * done} or so"
            )
        if processes.rank == 0:
            run.rewind(done)
    state = _State(student, optimiser, rng, done, seconds, companions, processes)
    return _loop(state, objectives, plan, run if processes.rank == 0 else None, picture)


@dataclass
class _State:
    """What a checkpoint holds."""

    student: Student
    optimiser: torch.optim.Optimizer
    rng: torch.Generator
    done: int
    seconds: float
    companions: Mapping[str, Companion]
    processes: Processes

    def row(self) -> dict[str, float]:
        """What metrics.jsonl has of every step: how many are done, seconds, peak memory in MB where it is known."""
        row = {"step": self.done, "seconds": round(self.seconds, 3)}
        used = memory.peak(self.optimiser.param_groups[0]["params"][0].device)
        return row if used is None else {**row, "memory": round(used, 1)}

    def save(self, run: RunFolder | None) -> None:
        """Write it. A process that has no run gives its part of what is sharded.

        Raises:
            Diverged: a weight is not finite; the checkpoint of before stays.
        """
        if run is None and not self.processes.sharded:
            return
        state = {
            "step": self.done,
            "seconds": self.seconds,
            "student": self.student.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.rng.get_state(),
            "companions": {name: companion.state_dict() for name, companion in self.companions.items()},
        }
        if run is not None:
            _require_sound(state, self.done)
            run.save_checkpoint(state)


@stepwise_training
def _loop(
    state: _State,
    objectives: Mapping[str, Objective],
    plan: Plan,
    run: RunFolder | None,
    picture: Callable[[], Tensor] | None,
) -> Generator[Step]:
    """The steps that are left; saves when it is closed between two of them."""
    memory.reset_peak()
    earlier, started = state.seconds, time.perf_counter()
    saved = state.done
    try:
        while state.done < plan.steps:
            metrics = _one_step(state, objectives, plan).read()
            loss = metrics.pop("loss")
            last = state.done == plan.steps
            shown = None
            if picture is not None and plan.picture_every and (last or state.done % plan.picture_every == 0):
                shown = picture()
            state.seconds = earlier + time.perf_counter() - started
            if run is not None:
                run.append(state.row() | {"loss": loss, **metrics})
                if shown is not None:
                    run.save_picture(state.done, shown)
            if last or state.done % plan.save_every == 0:
                state.save(run)
                saved = state.done
            handed = time.perf_counter()
            yield Step(state.done, plan.steps, loss, metrics, state.seconds, shown)
            started += time.perf_counter() - handed  # a pause is no training
    except GeneratorExit:
        if saved != state.done:
            state.save(run)
        raise


def _one_step(state: _State, objectives: Mapping[str, Objective], plan: Plan) -> Figures:
    """Draw, judge, go backward, move; returns the step's figures, "loss" among them."""
    student, step, rng, figures = state.student, plan.step_in_phase(state.done), state.rng, Figures()
    if step == 0 and state.done:
        assert isinstance(student, Phased), student
        student.begin_phase()
        state.optimiser = make_optimiser(student, plan.optim)
    optimiser = state.optimiser
    for name, companion in state.companions.items():
        if isinstance(companion, DrawlessCompanion):
            companion.update(step)
        elif companion.steps:
            figures.add(name, _fit(name, companion, state, step, figures))
    total = _loss(state, objectives, plan, figures)
    optimiser.zero_grad(set_to_none=True)
    total.backward()
    state.processes.average([p for group in optimiser.param_groups for p in group["params"]])
    for group in optimiser.param_groups:
        group["lr"] = plan.optim.lr[group["name"]](step)
        limit = plan.optim.clip.get(group["name"], float("inf"))
        norm = state.processes.whole(torch.nn.utils.clip_grad_norm_(group["params"], limit))
        _require_finite(figures, norm, f"the gradient of {group['name']!r}", state.done)
        figures.add(f"grad/{group['name']}", norm)
    optimiser.step()
    student.after_step(step, rng)
    state.done += 1
    figures.add("loss", total.detach())
    return figures


def _loss(state: _State, objectives: Mapping[str, Objective], plan: Plan, figures: Figures) -> Tensor:
    """The objectives' losses and the weighted regularisers, summed, (); their figures are added."""
    student, step, rng = state.student, plan.step_in_phase(state.done), state.rng
    drawn = not all(isinstance(objective, DrawlessObjective) for objective in objectives.values())
    draw = student.draw(step, rng) if drawn else None
    terms = []
    for name, objective in objectives.items():
        if isinstance(objective, DrawlessObjective):
            judged = objective.evaluate_without_draw(step, rng)
        else:
            assert draw is not None, name
            judged = objective(draw, step, rng)
        _require_finite(figures, judged.loss, f"the loss {name!r}", state.done)
        terms.append(judged.loss)
        for key, value in judged.metrics.items():
            figures.add(key if len(objectives) == 1 else f"{name}/{key}", value)
    for name, value in student.regularisers().items() if drawn else ():
        _require_finite(figures, value, f"the regulariser {name!r}", state.done)
        weight = plan.lambdas[name](step) if name in plan.lambdas else 0.0
        if weight and value.requires_grad:
            terms.append(weight * value)
        figures.add(name, value.detach())
    return sum(terms[1:], terms[0])


def _fit(name: str, companion: DrawnCompanion, state: _State, step: int, figures: Figures) -> Tensor:
    """A companion's fits of one step; returns their mean loss, ()."""
    losses = []
    for _ in range(companion.steps):
        with torch.no_grad():
            draw = state.student.draw(step, state.rng)
        losses.append(companion.fit(draw, state.rng))
    loss = torch.stack(losses).mean()
    _require_finite(figures, loss, f"the {name}'s loss", state.done)
    return loss


def _require_finite(figures: Figures, value: Tensor, what: str, step: int) -> None:
    error = Diverged(f"{what} is not finite at step {step}: lower optim.lr or the method's scale")
    figures.require(torch.isfinite(value).all(), error)


def _require_sound(state: Mapping[str, Any], done: int) -> None:
    """Raises Diverged where a weight of the student or of a companion is not finite: a last step can be too large for
    its number, though loss and gradient were finite."""
    parts = [("student", "optim.lr", state["student"])]
    parts += [(name, f"{name}.lr", own) for name, own in state["companions"].items()]
    for who, setting, own in parts:
        for name, value in _weights(own):
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise Diverged(f"{name} of the {who} is not finite after step {done}: lower {setting}")


def _weights(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state by their dotted names; an optimiser's own are left out."""
    if torch.is_tensor(state):
        yield name, state
    elif isinstance(state, Mapping | list):
        for key, value in state.items() if isinstance(state, Mapping) else enumerate(state):
            if key != "optimiser":
                yield from _weights(value, f"{name}.{key}" if name else str(key))


def _restore(
    run: RunFolder,
    student: Student,
    optimiser: torch.optim.Optimizer,
    rng: torch.Generator,
    companions: Mapping[str, Companion],
) -> tuple[int, float]:
    """Load everything from the run's checkpoint; returns the steps and seconds done."""
    state = run.load_checkpoint()
    try:
        student.load_state_dict(state["student"])
        optimiser.load_state_dict(state["optimiser"])
        lay_out(optimiser)
        rng.set_state(state["generator"])
        states = _of_companions(state)
        if states.keys() != companions.keys():
            raise ValueError(f"it holds {_named(states)} beside the student, and the run has {_named(companions)}")
        for name, companion in companions.items():
            companion.load_state_dict(states[name])
        done, seconds = int(state["step"]), float(state["seconds"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{run.checkpoint} does not fit this run's config.yaml: {error}".splitlines()[0]) from error
    return done, seconds


def _of_companions(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The companions' states by name. Older checkpoints know one companion, a critic, or None."""
    if "companions" in state:
        return state["companions"]
    return {} if state["critic"] is None else {"critic": state["critic"]}


def _named(companions: Mapping[str, Any]) -> str:
    return ", ".join(companions) or "nothing"
