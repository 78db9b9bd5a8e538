"""An edited scene, which renders each view together with the same view of the original scene."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sds3d.students.base import Draw
from sds3d.students.representation import Scene, domain_image


class EditedScene:
    """A scene as a student whose draws contain the source as well (for DDS).

    Args:
        scene: the scene that is trained.
        source: the scene before the edit; it never changes.
    """

    def __init__(self, scene: Scene, source: Scene):
        self.scene, self.source = scene, source
        source.learn_backgrounds(scene.backgrounds)

    def draw(self, step: int, rng: torch.Generator) -> Draw:
        """Return the scene's views, and the source's from the same cameras on the same background."""
        draw = self.scene.draw(step, rng)
        assert draw.cameras is not None, "a scene has cameras"
        background = None if self.scene.background_name == "learned" else self.scene.background_name
        views = self.source.render_view(
            draw.cameras, draw.images.shape[-1], normals=draw.domain == "normals", background=background
        )
        draw.source = domain_image(views, draw.cameras.to(draw.images.device), draw.domain)
        return draw

    def regularisers(self) -> dict[str, Tensor]:
        """Return the scene's regularisers."""
        return self.scene.regularisers()

    def param_groups(self) -> dict[str, list[Parameter]]:
        """Return the scene's groups: the source is not trained."""
        return self.scene.param_groups()

    def after_step(self, step: int, rng: torch.Generator) -> None:
        """Do what the scene does after a step."""
        self.scene.after_step(step, rng)

    def state_dict(self) -> dict[str, Any]:
        """Return the scene's state."""
        return self.scene.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Restore the scene's state."""
        return self.scene.load_state_dict(state)
