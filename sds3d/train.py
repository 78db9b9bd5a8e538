"""The training loop: draw from the student, compute the objectives' losses, one backward, one optimiser step.

The loop yields a `Step` after each step. Losses and checks of a GPU are copied to the host once, at the end of a step.
Exactly one whole step lies between two yields. Closing the generator, as Ctrl-C does in the command line, therefore
leaves a consistent state, which is saved. Resuming continues the random stream: on a CPU, with the same backend and
number of threads, an interrupted run ends bit for bit like an uninterrupted one.
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
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.torch_modes import stepwise_training, training
from sds3d.runtime.transfer import StepMetrics
from sds3d.students.base import Draw, Phased, Student
from sds3d.students.companions import Companion, FittedCompanion, UpdatedCompanion
from sds3d.students.optim import OptimConfig, make_optimiser, match_layout


class Judged(Protocol):
    """The result of an objective: a loss to differentiate, and named figures to log."""

    loss: Tensor

    @property
    def metrics(self) -> Mapping[str, float | Tensor]:
        """Name -> figure, a float or a tensor ()."""
        ...


DrawnObjective = Callable[[Draw, int, torch.Generator], Judged]


@runtime_checkable
class DrawlessObjective(Protocol):
    """An objective that needs no draw of the student, such as a regression on pairs, which calls the network itself."""

    def evaluate_without_draw(self, step: int, rng: torch.Generator) -> Judged: ...


Objective = DrawnObjective | DrawlessObjective


class RunFolder(Protocol):
    """The folder that the loop writes to; see `sds3d.runs.folder.Run`."""

    path: Path
    checkpoint: Path

    def save_checkpoint(self, state: dict[str, Any]) -> None: ...

    def load_checkpoint(self) -> dict[str, Any]: ...

    def append(self, row: dict[str, float]) -> None: ...

    def rewind(self, step: int) -> None: ...

    def save_picture(self, step: int, views: Tensor) -> None: ...


@dataclass(frozen=True)
class Plan:
    """The settings of the loop.

    Args:
        steps: total number of steps.
        seed: seed of every random draw in the run.
        lambdas: regulariser -> its weight, a Ramp over steps; a regulariser without a weight is only logged.
        optim: learning rates and clipping.
        save_every: steps between checkpoints (one is always written at the end).
        picture_every: steps between progress pictures; 0 for none.
        phase_steps: steps of a phase; 0 for a single phase. At the beginning of each further phase, the student's
            running mean becomes its teacher and its weights, the optimiser is new, and schedules begin again at step
            0. Companions continue.
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
        """Return the index, from 0, of the next step within its phase, after ``done`` steps of the run."""
        return done % self.phase_steps if self.phase_steps else done


@dataclass(frozen=True)
class Step:
    """One finished step.

    Args:
        step: number of steps done, 1 .. total.
        total: number of steps of the whole run.
        loss: sum of all objectives and weighted regularisers; for score methods its value has no meaning.
        metrics: named figures, as in the row of metrics.jsonl.
        seconds: training time so far, including earlier sessions of a resumed run.
        picture: (B, 3, H, W) in [0, 1] if this step made a progress picture, else None.
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
    """Train ``student``. Returns a generator that yields after every step.

    The checkpoint of a resumed run is read at once, before the first step. Each step computes gradients even if the
    caller has turned them off; see `sds3d.runtime.torch_modes`.

    Args:
        student: the object with the parameters.
        objectives: name -> objective; their losses are summed. If no objective needs a draw of the student, none is
            made, and the student's regularisers, which belong to a draw, do not count.
        plan: steps, seed, weights, learning rates.
        run: the folder for checkpoints, metrics and pictures; None writes nothing.
        resume: continue from the run's checkpoint.
        picture: makes the views (B, 3, H, W) of a progress picture.
        companions: name -> companion, trained beside the student before every step, in this order: each is fitted
            ``steps`` times on fresh draws, or updated without a draw. The name is used in the metrics and for the
            companion's settings.
        processes: the processes that train together; the one of rank 0 writes files.

    Raises:
        ValueError: the disk is full, the checkpoint is missing or damaged or does not fit the student, a group of
            parameters has no learning rate, the run has done more steps than the plan has, or the plan has phases and
            the student does not support them.
        Diverged: a loss, a regulariser or a gradient is not finite.
    """
    if plan.phase_steps and (processes.sharded or not isinstance(student, Phased)):
        reason = "fsdp keeps in parts" if processes.sharded else f"a {type(student).__name__} does not have"
        raise ValueError(f"a phase begins from a running mean of the weights, which {reason}: leave phase_steps at 0")
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
    """The state of training, which a checkpoint holds."""

    student: Student
    optimiser: torch.optim.Optimizer
    rng: torch.Generator
    done: int
    seconds: float
    companions: Mapping[str, Companion]
    processes: Processes

    def row(self) -> dict[str, float]:
        """The first entries of a row of metrics.jsonl: steps done, seconds, and peak memory in MB if it is known."""
        row = {"step": self.done, "seconds": round(self.seconds, 3)}
        peak = memory.peak(self.optimiser.param_groups[0]["params"][0].device)
        return row if peak is None else {**row, "memory": round(peak, 1)}

    def save(self, run: RunFolder | None) -> None:
        """Write a checkpoint. A process without a run folder takes part only if the weights are sharded.

        Raises:
            Diverged: a weight is not finite; the earlier checkpoint stays.
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
    """The remaining steps. Saves a checkpoint if it is closed between two of them."""
    memory.reset_peak()
    earlier, started = state.seconds, time.perf_counter()
    saved_step = state.done
    try:
        while state.done < plan.steps:
            metrics = _one_step(state, objectives, plan).read()
            loss = metrics.pop("loss")
            last = state.done == plan.steps
            views = None
            if picture is not None and plan.picture_every and (last or state.done % plan.picture_every == 0):
                views = picture()
            state.seconds = earlier + time.perf_counter() - started
            if run is not None:
                run.append(state.row() | {"loss": loss, **metrics})
                if views is not None:
                    run.save_picture(state.done, views)
            if last or state.done % plan.save_every == 0:
                state.save(run)
                saved_step = state.done
            yielded = time.perf_counter()
            yield Step(state.done, plan.steps, loss, metrics, state.seconds, views)
            started += time.perf_counter() - yielded  # time in the caller is not training time
    except GeneratorExit:
        if saved_step != state.done:
            state.save(run)
        raise


def _one_step(state: _State, objectives: Mapping[str, Objective], plan: Plan) -> StepMetrics:
    """Do one step. Returns its figures, "loss" among them."""
    student, step, rng, figures = state.student, plan.step_in_phase(state.done), state.rng, StepMetrics()
    if step == 0 and state.done:
        assert isinstance(student, Phased), student
        student.begin_phase()
        state.optimiser = make_optimiser(student, plan.optim)
    optimiser = state.optimiser
    for name, companion in state.companions.items():
        if isinstance(companion, UpdatedCompanion):
            companion.update(step)
        elif companion.steps:
            figures.add(name, _fit(name, companion, state, step, figures))
    total = _loss(state, objectives, plan, figures)
    optimiser.zero_grad(set_to_none=True)
    total.backward()
    state.processes.average_gradients([p for group in optimiser.param_groups for p in group["params"]])
    for group in optimiser.param_groups:
        group["lr"] = plan.optim.lr[group["name"]](step)
        limit = plan.optim.clip.get(group["name"], float("inf"))
        norm = state.processes.full_tensor(torch.nn.utils.clip_grad_norm_(group["params"], limit))
        _require_finite(figures, norm, f"the gradient of {group['name']!r}", state.done)
        figures.add(f"grad/{group['name']}", norm)
    optimiser.step()
    student.after_step(step, rng)
    state.done += 1
    figures.add("loss", total.detach())
    return figures


def _loss(state: _State, objectives: Mapping[str, Objective], plan: Plan, figures: StepMetrics) -> Tensor:
    """The sum of the objectives' losses and the weighted regularisers, (). Adds their figures to ``figures``."""
    student, step, rng = state.student, plan.step_in_phase(state.done), state.rng
    needs_draw = not all(isinstance(objective, DrawlessObjective) for objective in objectives.values())
    draw = student.draw(step, rng) if needs_draw else None
    terms = []
    for name, objective in objectives.items():
        if isinstance(objective, DrawlessObjective):
            result = objective.evaluate_without_draw(step, rng)
        else:
            assert draw is not None, name
            result = objective(draw, step, rng)
        _require_finite(figures, result.loss, f"the loss {name!r}", state.done)
        terms.append(result.loss)
        for key, value in result.metrics.items():
            figures.add(key if len(objectives) == 1 else f"{name}/{key}", value)
    for name, value in student.regularisers().items() if needs_draw else ():
        _require_finite(figures, value, f"the regulariser {name!r}", state.done)
        weight = plan.lambdas[name](step) if name in plan.lambdas else 0.0
        if weight and value.requires_grad:
            terms.append(weight * value)
        figures.add(name, value.detach())
    return sum(terms[1:], terms[0])


def _fit(name: str, companion: FittedCompanion, state: _State, step: int, figures: StepMetrics) -> Tensor:
    """Fit a companion for one step. Returns the mean loss of its fits, ()."""
    losses = []
    for _ in range(companion.steps):
        with torch.no_grad():
            draw = state.student.draw(step, state.rng)
        losses.append(companion.fit(draw, state.rng))
    loss = torch.stack(losses).mean()
    _require_finite(figures, loss, f"the {name}'s loss", state.done)
    return loss


def _require_finite(figures: StepMetrics, value: Tensor, what: str, step: int) -> None:
    error = Diverged(f"{what} is not finite at step {step}: lower optim.lr or the method's scale")
    figures.require(torch.isfinite(value).all(), error)


def _require_sound(state: Mapping[str, Any], done: int) -> None:
    """Raise Diverged if a weight of the student or of a companion is not finite.

    An optimiser step can overflow a weight even if loss and gradient are finite.
    """
    parts = [("student", "optim.lr", state["student"])]
    parts += [(name, f"{name}.lr", weights) for name, weights in state["companions"].items()]
    for owner, setting, weights in parts:
        for name, value in _weights(weights):
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise Diverged(f"{name} of the {owner} is not finite after step {done}: lower {setting}")


def _weights(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested state with their dotted names, without those of an optimiser."""
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
    """Load the run's checkpoint into all parts. Returns the steps and seconds done."""
    state = run.load_checkpoint()
    try:
        student.load_state_dict(state["student"])
        optimiser.load_state_dict(state["optimiser"])
        match_layout(optimiser)
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
    """The companions' states by name. Older checkpoints have "critic" instead, a state or None."""
    if "companions" in state:
        return state["companions"]
    return {} if state["critic"] is None else {"critic": state["critic"]}


def _named(companions: Mapping[str, Any]) -> str:
    return ", ".join(companions) or "nothing"
