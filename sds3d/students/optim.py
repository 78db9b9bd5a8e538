"""The optimiser of a student: Adam, with settings for each named parameter group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch

from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import Within
from sds3d.students.base import Student


@dataclass(frozen=True)
class OptimConfig:
    """Settings of Adam, with a learning rate and a largest gradient norm for each named group of the student.

    Args:
        lr: group -> learning rate, a Ramp over steps. Each student class has its defaults in ``OPTIM``.
        clip: group -> largest gradient norm; groups without an entry are not clipped.
        betas, eps: Adam's.
    """

    lr: dict[str, Annotated[Ramp, Within(0, 1000)]] = field(default_factory=dict)
    clip: dict[str, Annotated[float, Within(0, 1e9, above=True)]] = field(default_factory=dict)
    betas: Annotated[tuple[float, float], Within(0, 1)] = (0.9, 0.99)
    eps: Annotated[float, Within(0, 1, above=True)] = 1e-8

    def __post_init__(self):
        for name, ramp in self.lr.items():
            if min(ramp.v0, ramp.v1) < 0:
                raise ValueError(f"optim.lr.{name} is {ramp}; give a learning rate of at least 0")
        for name, value in self.clip.items():
            if not value > 0:
                raise ValueError(f"optim.clip.{name} is {value}; give a positive gradient norm, or leave it out")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas is {self.betas}; give two numbers in [0, 1)")
        if not self.eps > 0:
            raise ValueError(f"optim.eps is {self.eps}; give a positive number")


def make_optimiser(student: Student, config: OptimConfig) -> torch.optim.Adam:
    """Return Adam over the student's named groups.

    Raises:
        ValueError: a group has no learning rate, or optim.lr or optim.clip names a group that does not exist.
    """
    known = {name: list(params) for name, params in student.param_groups().items()}
    groups = {name: params for name, params in known.items() if params}
    for name in groups:
        if name not in config.lr:
            raise ValueError(f"the parameters {name!r} have no learning rate; give optim.lr.{name}=1e-3 or so")
    settings = [("lr", name) for name in config.lr if name not in known]  # an empty group may have a learning rate
    for setting, name in settings + [("clip", name) for name in config.clip]:
        if name not in groups:
            raise ValueError(f"optim.{setting}.{name}: there is no such group; there are {', '.join(groups)}")
    devices = {p.device.type for params in groups.values() for p in params}
    return torch.optim.Adam(
        [{"params": params, "name": name, "lr": config.lr[name](0)} for name, params in groups.items()],
        betas=config.betas,
        eps=config.eps,
        fused=devices <= {"cpu", "cuda"},
    )


def match_layout(optimiser: torch.optim.Optimizer) -> None:
    """Give the optimiser's state the memory layout of its parameters.

    A fused step requires that layout, and a checkpoint does not keep it.
    """
    for parameter, state in optimiser.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)
