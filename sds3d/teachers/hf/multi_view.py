"""Stable Diffusion that sees several views of one scene at once, as MVDream does (Shi et al., arXiv 2308.16512).

It is a StableDiffusionPipeline whose U-Net says ``class_embed_type: projection`` of 16 numbers, which no text-to-image
model does: they are the camera. That is MVDream's network in diffusers' own words:

    embedding of t  +  two linear layers of the camera's matrix (4 x 4, row by row)       section 3.2
    self-attention over the pixels of all views of a set, attention to the prompt view by view

so its weights fit after their names are mapped. The matrix takes camera to world axes with z up and the camera one
unit from the origin. A set is ``views_per_set`` neighbouring rows. Without cameras every row is seen alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sds3d.cameras import Cameras
from sds3d.teachers.hf import fields
from sds3d.teachers.hf.families import Family

NUMBERS = 16  # of a camera
Z_UP = torch.tensor([[1.0, 0, 0], [0, 0, -1.0], [0, 1.0, 0]])  # from the world's axes (cameras.py), in which y is up


class MultiView(Family):
    """See above."""

    PIPELINES = ()  # a StableDiffusionPipeline's files: what its U-Net says tells them apart
    FIELDS = fields.UNET.with_values(class_embed_type=("projection",))
    views_per_set = 4

    def prepare(self) -> None:
        """See `Family.prepare`."""
        join_views(self.network)

    def camera_condition(self, cameras: Cameras, camera_mask: Tensor | None) -> dict[str, Tensor]:
        """See `Family.camera_condition`."""
        numbers = camera_numbers(cameras)
        return {"cameras": numbers if camera_mask is None else numbers * camera_mask.cpu()[:, None]}

    def answer(self, network: nn.Module, x_t: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """See `Family.answer`."""
        numbers, views = condition.get("cameras"), self.views_per_set
        if numbers is None:
            numbers, views = x_t.new_zeros(len(x_t), NUMBERS), 1
        if len(x_t) % views:
            raise ValueError(f"this teacher sees {views} views of a scene at once and got {len(x_t)}; give a multiple")
        return network(
            x_t,
            timesteps,
            condition["words"],
            timestep_cond=self._guidance(x_t),
            class_labels=numbers.to(x_t),
            cross_attention_kwargs={"views": views},
            return_dict=False,
        )[0]


def is_multi_view(pipe: Any) -> bool:
    """Whether a Stable Diffusion's U-Net is told cameras."""
    config = getattr(pipe, "unet", None) and pipe.unet.config
    wanted = ("projection", NUMBERS)
    return (
        bool(config) and (config.get("class_embed_type"), config.get("projection_class_embeddings_input_dim")) == wanted
    )


def camera_numbers(cameras: Cameras) -> Tensor:
    """What the network is told of cameras: (B, 16)."""
    matrices = torch.eye(4).repeat(len(cameras), 1, 1)
    positions = cameras.positions().cpu()
    matrices[:, :3, :3] = Z_UP @ cameras.rotations().cpu()
    matrices[:, :3, 3] = positions / positions.norm(dim=-1, keepdim=True) @ Z_UP.T
    return matrices.flatten(1)


def join_views(network: Any) -> None:
    """Let the self-attentions of a diffusers U-Net look at all views of a set, where they are told how many."""
    kept = network.attn_processors
    network.set_attn_processor({name: JointAttention(one, "attn1" in name) for name, one in kept.items()})


class JointAttention:
    """An attention processor around another, which sees the pixels of a set's views as one image's.

    Args:
        inner: what attends.
        joins: whether this is self-attention; attention to the prompt stays each view's own.
    """

    def __init__(self, inner: Any, joins: bool):
        self.inner, self.joins = inner, joins

    def __call__(self, attention: nn.Module, hidden_states: Tensor, *rest: Any, views: int = 1, **named: Any) -> Tensor:
        """Answer as ``inner`` does, over the pixels of ``views`` views."""
        if not self.joins or views == 1:
            return self.inner(attention, hidden_states, *rest, **named)
        count, pixels, width = hidden_states.shape
        joined = hidden_states.reshape(count // views, views * pixels, width)
        return self.inner(attention, joined, *rest, **named).reshape(count, pixels, width)
