"""The protocol of students: the trained side of the loop, which makes images. A teacher sees only their ``Draw``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import Parameter

from sds3d.cameras import Cameras
from sds3d.runtime.distributed import Processes

OUTSIZED = 100.0  # root mean square of a parameter tensor; in successful runs it is about 1


@dataclass
class Draw:
    """Images that a student made for one step, with what the teacher needs to judge them.

    Args:
        images: (B, 3, H, W) in [0, 1] unless ``encoded``, differentiable in the student's parameters.
        prompts: B prompts, without view words.
        cameras: B cameras, on the CPU, or None if the images have no cameras.
        group: (B,) long, on the CPU; images of one group are views of one scene and have the same t.
        particle: index of the particle that made them.
        source: images (B, 3, H, W) from before an edit, for methods that compare with them.
        encoded: whether the images are already x (B, C, h, w), in the space in which the teacher denoises.
        processes: the process group, if several processes train; the images are this process's rows of the batch.
        domain: what the images show, a key of `sds3d.domains.WORDS`.
        weight: factor of the gradient on these images.
    """

    images: Tensor  # (B, 3, H, W)
    prompts: list[str]
    cameras: Cameras | None
    group: Tensor  # (B,) long
    particle: int = 0
    source: Tensor | None = None  # (B, 3, H, W)
    encoded: bool = False
    processes: Processes = Processes()
    domain: str = "colours"
    weight: float = 1.0

    def x(self, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the images in the space in which a teacher denoises, (B, C, h, w), given the teacher's ``encode``."""
        return self.images if self.encoded else encode(self.images)


class Student(Protocol):
    """An object with parameters that draws images: a scene, a pixel grid, a generator."""

    def draw(self, step: int, rng: torch.Generator) -> Draw:
        """Return fresh images, with gradients."""
        ...

    def regularisers(self) -> dict[str, Tensor]:
        """Return the last draw's regularisers: named scalars, unweighted."""
        ...

    def param_groups(self) -> dict[str, list[Parameter]]:
        """Return the parameters by the name of their group, such as "grid", "mlp" or "background", which selects the
        learning rate. A group of this kind of student that this student does not use is empty."""
        ...

    def after_step(self, step: int, rng: torch.Generator) -> None:
        """Update what is not learned by gradient, such as the occupancy grid."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint keeps."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Restore a state from `state_dict`."""
        ...


@runtime_checkable
class Phased(Protocol):
    """A student that becomes its own teacher at the start of a new phase of a run, as in progressive distillation."""

    def begin_phase(self) -> None:
        """Copy the running mean of the weights into the teacher, in place, and into the weights. States saved from now
        on contain the teacher's weights too."""
        ...


class Particles:
    """Several students of one kind with one critic. In each step a random one of them makes the images.

    Only that particle gets gradients. Adam skips parameters without a gradient, so each particle has its own moments.
    """

    def __init__(self, students: Sequence[Student]):
        assert len(students) > 1, students
        self.students, self.drawn = list(students), 0

    def draw(self, step: int, rng: torch.Generator) -> Draw:
        """Return the images of one particle."""
        self.drawn = int(torch.randint(len(self.students), (), generator=rng))
        draw = self.students[self.drawn].draw(step, rng)
        draw.particle = self.drawn
        return draw

    def regularisers(self) -> dict[str, Tensor]:
        """Return those of the particle that drew last."""
        return self.students[self.drawn].regularisers()

    def param_groups(self) -> dict[str, list[Parameter]]:
        """Return the particles' groups, merged by name."""
        groups: dict[str, list[Parameter]] = {}
        for student in self.students:
            for name, parameters in student.param_groups().items():
                groups.setdefault(name, []).extend(parameters)
        return groups

    def after_step(self, step: int, rng: torch.Generator) -> None:
        """Update every particle, whichever one drew."""
        for student in self.students:
            student.after_step(step, rng)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all particles."""
        return {"particles": [student.state_dict() for student in self.students]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        for student, own in zip(self.students, state["particles"], strict=True):
            student.load_state_dict(own)


def outsized(student: Student) -> str:
    """Return a warning if parameters have grown out of bounds, as with a far too large learning rate; else "".

    The loss can stay finite in this case: a scene's density saturates, and its gradient becomes small.
    """
    for name, parameters in student.param_groups().items():
        for parameter in parameters:
            size = float(parameter.detach().float().square().mean().sqrt())
            if size > OUTSIZED:
                return (
                    f"the parameters of {name} have grown to {size:.3g}: optim.lr.{name} is far too large, and the "
                    "result is noise; start again with a lower one"
                )
    return ""
