"""A scene that is edited: beside each of its views, the same view of what it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sds3d.students.base import Draw
from sds3d.students.representation import Scene


class EditedScene:
    """A scene as a student, whose draws show the source, too (for DDS).

    Args:
        scene: what is trained.
        source: what it was; never changed.
    """

    def __init__(self, scene: Scene, source: Scene):
        self.scene, self.source = scene, source
        source.learn_backgrounds(scene.backgrounds)

    def draw(self, step: int, rng: torch.Generator) -> Draw:
        """The scene's views, and the source's from the same cameras on the same background."""
        draw = self.scene.draw(step, rng)
        assert draw.cameras is not None, "a scene has cameras"
        background = None if self.scene.background_name == "learned" else self.scene.background_name
        draw.source = self.source.render_view(draw.cameras, draw.images.shape[-1], background=background).rgb
        return draw

    def regularisers(self) -> dict[str, Tensor]:
        """The scene's."""
        return self.scene.regularisers()

    def param_groups(self) -> dict[str, list[Parameter]]:
        """The scene's: the source is not trained."""
        return self.scene.param_groups()

    def after_step(self, step: int, rng: torch.Generator) -> None:
        """What the scene does then."""
        self.scene.after_step(step, rng)

    def state_dict(self) -> dict[str, Any]:
        """The scene's."""
        return self.scene.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Load the scene's."""
        return self.scene.load_state_dict(state)
