"""Stable Diffusion that denoises several views of one scene jointly, as MVDream does (Shi et al., arXiv 2308.16512).

It is a StableDiffusionPipeline whose U-Net has ``class_embed_type: projection`` of 16 numbers, the camera. No
text-to-image model has that. It expresses MVDream's network in diffusers' configuration:

    embedding of t  +  two linear layers of the camera's matrix (4 x 4, row by row)       section 3.2
    self-attention over the pixels of all views of a set, attention to the prompt for each view

MVDream's weights fit after their names are mapped. The matrix maps camera axes to world axes, with z up and the camera
one unit from the origin. A set is ``views_per_set`` neighbouring rows. Without cameras every row is its own set.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sds3d.cameras import Cameras
from sds3d.teachers.hf import config_fields
from sds3d.teachers.hf.families import Family

NUMBERS = 16  # entries of a camera's matrix
Z_UP = torch.tensor([[1.0, 0, 0], [0, 0, -1.0], [0, 1.0, 0]])  # from sds3d's world axes (cameras.py), y up, to z up


class MultiView(Family):
    """Multi-view Stable Diffusion; see the module."""

    PIPELINES = ()  # its files name StableDiffusionPipeline; `is_multi_view` recognises them
    FIELDS = config_fields.UNET.with_values(class_embed_type=("projection",))
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
    """Return whether the U-Net of a Stable Diffusion pipeline takes cameras."""
    config = getattr(pipe, "unet", None) and pipe.unet.config
    wanted = ("projection", NUMBERS)
    return (
        bool(config) and (config.get("class_embed_type"), config.get("projection_class_embeddings_input_dim")) == wanted
    )


def camera_numbers(cameras: Cameras) -> Tensor:
    """Return the network's condition of cameras, (B, 16)."""
    matrices = torch.eye(4).repeat(len(cameras), 1, 1)
    positions = cameras.positions().cpu()
    matrices[:, :3, :3] = Z_UP @ cameras.rotations().cpu()
    matrices[:, :3, 3] = positions / positions.norm(dim=-1, keepdim=True) @ Z_UP.T
    return matrices.flatten(1)


def join_views(network: Any) -> None:
    """Make the self-attention of a diffusers U-Net attend to all views of a set; ``views`` is a keyword of its call."""
    processors = network.attn_processors
    network.set_attn_processor({name: JointAttention(inner, "attn1" in name) for name, inner in processors.items()})


class JointAttention:
    """An attention processor that calls another one on the pixels of all views of a set, as if of one image.

    Args:
        inner: the processor to call.
        joins: whether to join the views, as self-attention does. Attention to the prompt does not.
    """

    def __init__(self, inner: Any, joins: bool):
        self.inner, self.joins = inner, joins

    def __call__(self, attention: nn.Module, hidden_states: Tensor, *rest: Any, views: int = 1, **named: Any) -> Tensor:
        """Call ``inner`` on the pixels of ``views`` views at a time."""
        if not self.joins or views == 1:
            return self.inner(attention, hidden_states, *rest, **named)
        count, pixels, width = hidden_states.shape
        joined = hidden_states.reshape(count // views, views * pixels, width)
        return self.inner(attention, joined, *rest, **named).reshape(count, pixels, width)
