"""Companions, which a run trains or updates beside its student: critics, discriminators, target networks."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sds3d.students.base import Draw


class Stateful(Protocol):
    """An object whose state a checkpoint keeps."""

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        ...


class FittedCompanion(Stateful, Protocol):
    """A companion trained on the student's draws, as a critic or a discriminator is; see distill/critics.py.

    Attributes:
        steps: fits before each step of the student; 0 for none.
    """

    steps: int

    def fit(self, draw: Draw, rng: torch.Generator) -> Tensor:
        """Take one training step on a fresh draw, made without gradients; return the loss, ()."""
        ...


@runtime_checkable
class UpdatedCompanion(Stateful, Protocol):
    """A companion that needs no draws, as a target network, which is a running mean of the student's weights."""

    def update(self, step: int) -> None:
        """Follow the student; called once before each of its steps."""
        ...


Companion = FittedCompanion | UpdatedCompanion
