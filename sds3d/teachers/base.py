"""What the score side asks of a teacher, whatever network is behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from sds3d.cameras import Cameras
from sds3d.diffusion.noise import Prediction, Schedule
from sds3d.runtime.ranges import Within

PACKAGED = ("small", "toybox", "digits")  # "toybox" is another name of "small"
VIEWS = ("camera", "words")  # how a teacher may be told where an image is seen from


OBJECT = "python:"  # begins teacher.name where the teacher was an object, which no name can load again


DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class HFConfig:
    """Of diffusers pipelines only.

    Args:
        variant: of the weights' files, as "fp16"; "" is the plain one, or the only one there is.
        allow_pickle: take .bin files where there is no .safetensors. Such a file can run any program it carries.
        size: pixels a side of the images it judges; 0 is what it was trained on. Smaller is faster and worse.
        embedded_guidance: what a guidance-distilled network (FLUX.1-dev, latent consistency models) is told, beside the
            method's own scale.
        cache: folder for embedded prompts; "" is sds3d/prompts in the user's cache folder.
        checkpointing: recompute the VAE encoder's layers in the backward pass: gigabytes less at 512 pixels, for one
            more forward of the encoder.
        slicing: encode one image at a time.
        tiling: encode large images in overlapping tiles, which differ slightly at their seams.
        attention_slicing: a U-Net's attention in slices, for GPUs without a memory-saving attention kernel.
        channels_last: the memory layout that convolutions in half precision like best.
        offload: keep the network off the GPU except while it answers; not for methods with a critic, which trains it.
    """

    variant: str = ""
    allow_pickle: bool = False
    size: Annotated[int, Within(8, 4096, also=0)] = 0
    embedded_guidance: Annotated[float, Within(0, 1000)] = 1.0
    cache: str = ""
    checkpointing: bool = True
    slicing: bool = False
    tiling: bool = False
    attention_slicing: bool = False
    channels_last: bool = False
    offload: bool = False

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"teacher.hf.size is {self.size}; give pixels a side, or 0 for the model's own")
        if self.embedded_guidance < 0:
            raise ValueError(f"teacher.hf.embedded_guidance is {self.embedded_guidance}; give at least 0 (1 to 5)")


@dataclass(frozen=True)
class TeacherConfig:
    """
    Args:
        name: a packaged teacher, a path to weights of the same kind, or a diffusers pipeline: its folder, or its id on
            the hub.
        views: how it learns where an image is seen from: "camera" (exactly; of a diffusers pipeline, embeddings of view
            words blended by the camera's angles) or "words" (front, side, back view).
        dtype: "auto" (bfloat16 where that is fast), "float32", "bfloat16", or of a diffusers pipeline "float16".
        compile: compile its network with torch.compile, which needs a C compiler: slow to begin, then faster. A
            packaged teacher's is replayed as a CUDA graph.
        hf: of diffusers pipelines.
    """

    name: str = "small"
    views: str = "camera"
    dtype: str = "auto"
    compile: bool = False
    hf: HFConfig = HFConfig()

    def __post_init__(self):
        if self.views not in VIEWS:
            raise ValueError(f"teacher.views is {self.views!r}; give {' or '.join(VIEWS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"teacher.dtype is {self.dtype!r}; give {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")


class Teacher(Protocol):
    """A frozen text-conditioned diffusion model that judges images.

    Attributes:
        schedule: its noise levels; every t below is that of this schedule.
        image_size: side of the images it was trained on, pixels.
        shape: (C, h, w) of one x, the space it denoises in.
        views: how it is told where an image is seen from: "camera" (cameras are passed, no view words) or
            "words" (the prompts carry view words, cameras are not passed).
        dtype: what its network computes in.

    What some have beside that are protocols of their own: `SeesSets`, `HasVocabulary`, `OnDevice`. One that knows a
    picture of the object takes it when it is made, and leaves it out where the prompt is "".
    """

    schedule: Schedule
    image_size: int
    shape: tuple[int, int, int]
    views: str
    dtype: torch.dtype

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1], any size -> x (B, C, h, w), the space it denoises in; differentiable."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> images (B, 3, H, W) in [0, 1]."""
        ...

    def predict(
        self,
        x_t: Tensor,  # (B, C, h, w)
        t: Tensor,  # (B,)
        prompts: list[str],
        cameras: Cameras | None = None,
        camera_mask: Tensor | None = None,  # (B,) bool
    ) -> Prediction:
        """Its answer at (x_t, t), without gradient, dropout off. "" is the null prompt. Where ``camera_mask`` is
        False the camera is dropped; no mask keeps all. Text embeddings are cached by the teacher."""
        ...

    def check(self, prompt: str) -> None:
        """Refuse what this teacher cannot read.

        Raises:
            ValueError: names the words it does not know and the nearest it does.
        """
        ...


@runtime_checkable
class SeesSets(Protocol):
    """A teacher that judges several views of one scene in one forward, as MVDream's kind does (4).

    Rows that come with cameras are sets of ``views_per_set`` neighbours, whose cameras stand evenly around the scene
    (`sds3d.cameras.CameraRanges.ring`).
    """

    views_per_set: int


@runtime_checkable
class HasVocabulary(Protocol):
    """A teacher that reads these words and no others."""

    vocabulary: tuple[str, ...]


@runtime_checkable
class OnDevice(Protocol):
    """A teacher that says where its network is."""

    @property
    def device(self) -> torch.device:
        """The device of what it is given."""
        ...


def object_name(teacher: Teacher) -> str:
    """What teacher.name says of a teacher that was given as an object: "python:" and its class."""
    return f"{OBJECT}{type(teacher).__module__}.{type(teacher).__qualname__}"


def views_per_set(teacher: Teacher) -> int:
    """How many views of one scene a teacher judges in one forward; 1 of most."""
    return teacher.views_per_set if isinstance(teacher, SeesSets) else 1


def encode_pixels(images: Tensor, image_size: int, channels: int = 3) -> Tensor:
    """images (B, 3, H, W) in [0, 1] -> (B, channels, image_size, image_size) in [-1, 1]: a pixel teacher's ``encode``.

    Shrinks by area, grows bilinearly; one channel is the mean of the three. Differentiable.
    """
    if channels == 1:
        images = images.mean(1, keepdim=True)
    height, width = images.shape[-2:]
    if min(height, width) >= image_size and max(height, width) > image_size:
        images = F.interpolate(images, (image_size, image_size), mode="area")
    elif (height, width) != (image_size, image_size):
        images = F.interpolate(images, (image_size, image_size), mode="bilinear", align_corners=False)
    return 2 * images - 1


def decode_pixels(x: Tensor) -> Tensor:
    """x (B, 1 or 3, H, W) in [-1, 1] -> images (B, 3, H, W) in [0, 1], clamped: a pixel teacher's ``decode``."""
    return ((x + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)
