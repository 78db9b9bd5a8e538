"""What a run trains or updates beside its student: critics, discriminators, target networks."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sds3d.students.base import Draw


class Lasting(Protocol):
    """What a checkpoint keeps the state of."""

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        ...


class DrawnCompanion(Lasting, Protocol):
    """What is trained beside the student on what it draws, as a critic or a discriminator; see distill/critics.py.

    Attributes:
        steps: fits before each step of the student, 0 for none.
    """

    steps: int

    def fit(self, draw: Draw, rng: torch.Generator) -> Tensor:
        """One fit on a fresh draw, made without gradients; returns the loss, ()."""
        ...


@runtime_checkable
class DrawlessCompanion(Lasting, Protocol):
    """What follows the student without its draws, as a target network, which is a running mean of its weights."""

    def update(self, step: int) -> None:
        """Called once before each step of the student."""
        ...


Companion = DrawnCompanion | DrawlessCompanion
