"""The interface of teachers, and the settings that choose one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from sds3d.cameras import Cameras
from sds3d.diffusion.noise import Prediction, Schedule
from sds3d.runtime.ranges import Within

PACKAGED = ("small", "toybox", "surface", "digits")  # "toybox" is another name of "small"
VIEWS = ("camera", "words")  # how a teacher gets the viewpoint of an image
OBJECT = "python:"  # begins teacher.name if the teacher is an object, which cannot be loaded by a name
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class HFConfig:
    """Settings of diffusers pipelines.

    Args:
        variant: variant of the weight files, such as "fp16"; "" is the plain one, or the only one available.
        allow_pickle: load .bin files if there is no .safetensors. Such a file can run any program it carries.
        size: side of the images in pixels; 0 is the size the model was trained on. Smaller is faster and worse.
        embedded_guidance: guidance scale embedded in a guidance-distilled network (FLUX.1-dev, latent consistency
            models), beside the method's own scale.
        cache: folder for embedded prompts; "" is sds3d/prompts in the user's cache folder.
        checkpointing: recompute the VAE encoder's layers in the backward pass. Saves gigabytes at 512 pixels, for one
            more forward of the encoder.
        slicing: encode one image at a time.
        tiling: encode large images in overlapping tiles, which differ slightly at their seams.
        attention_slicing: compute a U-Net's attention in slices, for GPUs without a memory-saving attention kernel.
        channels_last: use the channels-last memory layout, the fastest for convolutions in half precision.
        offload: keep the network off the GPU except while it predicts. Not for methods with a critic, which trains on
            the network.
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
            raise ValueError(f"teacher.hf.size is {self.size}; give pixels a side, or 0 for the model's own size")
        if self.embedded_guidance < 0:
            raise ValueError(f"teacher.hf.embedded_guidance is {self.embedded_guidance}; give at least 0 (1 to 5)")


@dataclass(frozen=True)
class NormalsConfig:
    """The teacher of the steps that show a scene's normals (``domains.normals``), where ``teacher.name`` is not to be.

    Args:
        name: another teacher, as for ``teacher.name``, with the teacher's other settings. "" is the teacher itself.
        words: words before the prompt in these steps, such as "normal map of". "" is the word "normals" after the
            prompt for a teacher that knows it, and no word for one that does not.
    """

    name: str = ""
    words: str = ""


@dataclass(frozen=True)
class TeacherConfig:
    """Settings of the teacher.

    Args:
        name: a packaged teacher, a path to weights of the same kind, or a diffusers pipeline: its folder, or its id on
            the hub.
        views: how the teacher gets the viewpoint of an image: "camera" (the exact camera; for a diffusers pipeline,
            embeddings of view words blended by the camera's angles) or "words" (front, side, back view).
        dtype: "auto" (bfloat16 where that is fast), "float32", "bfloat16", or for a diffusers pipeline "float16".
        compile: compile the network with torch.compile, which needs a C compiler. Starts slowly, then runs faster. On a
            GPU a packaged teacher runs as a CUDA graph.
        hf: settings of diffusers pipelines.
        normals: another teacher, or other words, for normals.
    """

    name: str = "small"
    views: str = "camera"
    dtype: str = "auto"
    compile: bool = False
    hf: HFConfig = HFConfig()
    normals: NormalsConfig = NormalsConfig()

    def __post_init__(self):
        if self.views not in VIEWS:
            raise ValueError(f"teacher.views is {self.views!r}; give {' or '.join(VIEWS)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"teacher.dtype is {self.dtype!r}; give {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")

    @property
    def short_name(self) -> str:
        """The name for display: of a path its last part, of an object its class."""
        if self.name.startswith(OBJECT):
            return self.name.rpartition(".")[2]
        return Path(self.name).name.removesuffix(".safetensors")


class Teacher(Protocol):
    """A frozen text-conditioned diffusion model.

    Attributes:
        schedule: noise schedule; every t below is a t of this schedule.
        image_size: side in pixels of the images it was trained on.
        shape: (C, h, w) of one x, the space it denoises in.
        views: how it gets the viewpoint: "camera" (cameras are passed, prompts have no view words) or "words" (prompts
            have view words, cameras are not passed).
        dtype: dtype in which the network computes.

    Optional abilities are protocols of their own: `HasViewSets`, `HasVocabulary`, `HasDomains`, `HasDevice`. A teacher
    conditioned on a picture of the object takes the picture in its constructor, and drops it where the prompt is "".
    """

    schedule: Schedule
    image_size: int
    shape: tuple[int, int, int]
    views: str
    dtype: torch.dtype

    def encode(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1], any size, to x (B, C, h, w); differentiable."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """Decode x (B, C, h, w) to images (B, 3, H, W) in [0, 1]."""
        ...

    def predict(
        self,
        x_t: Tensor,  # (B, C, h, w)
        t: Tensor,  # (B,)
        prompts: list[str],
        cameras: Cameras | None = None,
        camera_mask: Tensor | None = None,  # (B,) bool
    ) -> Prediction:
        """Return the prediction at (x_t, t), without gradient and without dropout.

        "" is the null prompt. Cameras are dropped where ``camera_mask`` is False; without a mask all are used. The
        teacher caches text embeddings.
        """
        ...

    def check(self, prompt: str) -> None:
        """Check that the teacher can read a prompt.

        Raises:
            ValueError: it cannot; names the unknown words and the nearest known ones.
        """
        ...


@runtime_checkable
class HasViewSets(Protocol):
    """A teacher that denoises several views of one scene jointly, as MVDream does (4 views).

    With cameras, a batch consists of sets of ``views_per_set`` neighbouring rows. The cameras of a set stand evenly
    around the scene (`sds3d.cameras.CameraRanges.ring`).
    """

    views_per_set: int


@runtime_checkable
class HasVocabulary(Protocol):
    """A teacher with a closed vocabulary."""

    vocabulary: tuple[str, ...]


@runtime_checkable
class HasDomains(Protocol):
    """A teacher that knows images of other domains than colours, each by its word in the prompt.

    Attributes:
        domains: keys of `sds3d.domains.WORDS`.
    """

    @property
    def domains(self) -> tuple[str, ...]:
        """See above."""
        ...


@runtime_checkable
class HasAnswerers(Protocol):
    """A teacher that lets others answer for some domains, as the packaged one does for normals, depths and albedo.

    See also `sds3d.teachers.by_domain.ByDomain`.

    The others have their own image size, space, schedule and way to get the viewpoint.
    """

    def answerer(self, domain: str) -> Teacher:
        """Return the teacher that answers for a domain."""
        ...


@runtime_checkable
class HasDevice(Protocol):
    """A teacher that names its device."""

    @property
    def device(self) -> torch.device:
        """The device of its network and of its inputs."""
        ...


def require_teacher(teacher: Any) -> None:
    """Raise ValueError if an object that a user gives is no `Teacher`."""
    if isinstance(teacher, type):
        raise ValueError(f"the teacher is the class {teacher.__name__}; give an object, as {teacher.__name__}()")
    members = [*Teacher.__annotations__, *(name for name in vars(Teacher) if not name.startswith("_"))]
    missing = [name for name in members if not hasattr(teacher, name)]
    if missing:
        raise ValueError(
            f"the teacher is a {type(teacher).__name__} without {', '.join(missing)}; give a name, or an object that "
            "has all members of sds3d.teachers.base.Teacher"
        )
    if teacher.views not in VIEWS:
        raise ValueError(f"the teacher's views is {teacher.views!r}; let it be {' or '.join(VIEWS)}")


def object_name(teacher: Teacher) -> str:
    """What teacher.name says of a teacher that was given as an object: "python:" and its class."""
    return f"{OBJECT}{type(teacher).__module__}.{type(teacher).__qualname__}"


def domains_of(teacher: Teacher) -> tuple[str, ...]:
    """Return the domains that a teacher knows; ("colours",) for most teachers."""
    return teacher.domains if isinstance(teacher, HasDomains) else ("colours",)


def answerer(teacher: Teacher, domain: str) -> Teacher:
    """Return the teacher that answers for a domain; most teachers answer for all that they know."""
    return teacher.answerer(domain) if isinstance(teacher, HasAnswerers) else teacher


def views_per_set(teacher: Teacher) -> int:
    """Return how many views of one scene a teacher denoises jointly; 1 for most teachers."""
    return teacher.views_per_set if isinstance(teacher, HasViewSets) else 1


def encode_pixels(images: Tensor, image_size: int, channels: int = 3, sizes: Collection[int] = ()) -> Tensor:
    """Encode images (B, 3, H, W) in [0, 1] for a pixel teacher: (B, channels, image_size, image_size) in [-1, 1].

    Downsamples by area, upsamples bilinearly. One channel is the mean of the three. Differentiable.

    Args:
        sizes: further sides in pixels; square images of these sides keep their size.
    """
    if channels == 1:
        images = images.mean(1, keepdim=True)
    height, width = images.shape[-2:]
    if height == width and height in sizes:
        return 2 * images - 1
    if min(height, width) >= image_size and max(height, width) > image_size:
        images = F.interpolate(images, (image_size, image_size), mode="area")
    elif (height, width) != (image_size, image_size):
        images = F.interpolate(images, (image_size, image_size), mode="bilinear", align_corners=False)
    return 2 * images - 1


def decode_pixels(x: Tensor) -> Tensor:
    """Decode x (B, 1 or 3, H, W) in [-1, 1] of a pixel teacher to images (B, 3, H, W) in [0, 1], clamped."""
    return ((x + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)
