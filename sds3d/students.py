"""What makes images: the side of the loop that is trained. The score side never looks past ``Draw``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from sds3d.cameras import Cameras


@dataclass
class Draw:
    """Images a student made for one step, with what the teacher needs to judge them.

    Args:
        images: (B, 3, H, W) in [0, 1], differentiable in the student's parameters.
        prompts: B prompts, without view words.
        cameras: B cameras, or None where images have no camera.
        group: (B,) long; images of one group are views of one scene and share t.
        particle: which of the student's particles made them.
        source: what the images were before an edit began, (B, 3, H, W), for methods that compare with it.
    """

    images: Tensor  # (B, 3, H, W)
    prompts: list[str]
    cameras: Cameras | None
    group: Tensor  # (B,) long
    particle: int = 0
    source: Tensor | None = None  # (B, 3, H, W)


class Student(Protocol):
    """Anything with parameters that draws images: a scene, a pixel grid, a generator."""

    def draw(self, step: int, generator: torch.Generator) -> Draw:
        """Fresh images, with gradients."""
        ...

    def regularisers(self) -> dict[str, Tensor]:
        """Named scalars of the last draw, unweighted."""
        ...

    def param_groups(self) -> dict[str, list[Parameter]]:
        """Parameters by the group whose learning rate they follow, as "grid", "mlp", "background"."""
        ...

    def after_step(self, step: int, generator: torch.Generator) -> None:
        """What is not learnt by gradient, such as the occupancy grid."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...
