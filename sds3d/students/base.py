"""What makes images: the side of the loop that is trained. The score side never looks past ``Draw``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import Parameter

from sds3d.cameras import Cameras
from sds3d.runtime.distributed import Processes

OUTSIZED = 100.0  # root mean square of a parameter; in runs that succeed it is about 1


@dataclass
class Draw:
    """Images a student made for one step, with what the teacher needs to judge them.

    Args:
        images: (B, 3, H, W) in [0, 1] unless ``encoded``, differentiable in the student's parameters.
        prompts: B prompts, without view words.
        cameras: B cameras, on the CPU, or None where images have no camera.
        group: (B,) long, on the CPU; images of one group are views of one scene and share t.
        particle: which of the student's particles made them.
        source: what the images were before an edit began, (B, 3, H, W), for methods that compare with it.
        processes: of the batch that these rows are, where several processes train.
        encoded: the images are already x (B, C, h, w), in the space in which the teacher denoises.
    """

    images: Tensor  # (B, 3, H, W)
    prompts: list[str]
    cameras: Cameras | None
    group: Tensor  # (B,) long
    particle: int = 0
    source: Tensor | None = None  # (B, 3, H, W)
    encoded: bool = False
    processes: Processes = Processes()

    def x(self, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """The images in the space in which a teacher denoises, (B, C, h, w), given how it encodes images."""
        return self.images if self.encoded else encode(self.images)


class Student(Protocol):
    """Anything with parameters that draws images: a scene, a pixel grid, a generator."""

    def draw(self, step: int, rng: torch.Generator) -> Draw:
        """Fresh images, with gradients."""
        ...

    def regularisers(self) -> dict[str, Tensor]:
        """Named scalars of the last draw, unweighted."""
        ...

    def param_groups(self) -> dict[str, list[Parameter]]:
        """Parameters by the group whose learning rate they follow, as "grid", "mlp", "background". A group that this
        kind of student has, and this one has not, is empty."""
        ...

    def after_step(self, step: int, rng: torch.Generator) -> None:
        """What is not learnt by gradient, such as the occupancy grid."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Take up what `state_dict` gave."""
        ...


@runtime_checkable
class Phased(Protocol):
    """A student that can be its own teacher from one phase of a run to the next, as progressive distillation has it."""

    def begin_phase(self) -> None:
        """Let the running mean of the weights be the teacher, in place, and the weights from which to go on. A state
        that is saved from now on holds the teacher, too."""
        ...


class Particles:
    """Several students of one kind that share a critic: one of them, drawn anew, makes each step's images.

    Only the one that drew gets gradients, so every particle has Adam's moments for itself (a parameter without a
    gradient is passed over).
    """

    def __init__(self, students: Sequence[Student]):
        assert len(students) > 1, students
        self.students, self.drawn = list(students), 0

    def draw(self, step: int, rng: torch.Generator) -> Draw:
        """Images of one particle."""
        self.drawn = int(torch.randint(len(self.students), (), generator=rng))
        draw = self.students[self.drawn].draw(step, rng)
        draw.particle = self.drawn
        return draw

    def regularisers(self) -> dict[str, Tensor]:
        """Those of the particle that drew last."""
        return self.students[self.drawn].regularisers()

    def param_groups(self) -> dict[str, list[Parameter]]:
        """The particles' groups, joined by name."""
        groups: dict[str, list[Parameter]] = {}
        for student in self.students:
            for name, parameters in student.param_groups().items():
                groups.setdefault(name, []).extend(parameters)
        return groups

    def after_step(self, step: int, rng: torch.Generator) -> None:
        """For every particle: what is due at a step is due whoever drew."""
        for student in self.students:
            student.after_step(step, rng)

    def state_dict(self) -> dict[str, Any]:
        """Every particle's."""
        return {"particles": [student.state_dict() for student in self.students]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        for student, own in zip(self.students, state["particles"], strict=True):
            student.load_state_dict(own)


def outsized(student: Student) -> str:
    """A sentence where parameters have left all bounds, as they do at far too large a learning rate; "" elsewhere.

    A loss can stay finite there: a scene's density saturates, and its gradient is small.
    """
    for name, parameters in student.param_groups().items():
        for parameter in parameters:
            size = float(parameter.detach().float().square().mean().sqrt())
            if size > OUTSIZED:
                return (
                    f"the parameters of {name} have grown to {size:.3g}: optim.lr.{name} is far too large, and what "
                    "was made is noise; begin again with a lower one"
                )
    return ""
