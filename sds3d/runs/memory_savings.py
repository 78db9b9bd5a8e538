"""Settings that save memory, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass

from sds3d.config.schema import RunConfig
from sds3d.teachers.base import TeacherConfig
from sds3d.teachers.hf import loading


@dataclass(frozen=True)
class Saving:
    """A setting that saves memory.

    Args:
        setting: as it is typed, key=value.
        cost: what is paid for it.
        resumable: whether a run can take it up where it stopped.
    """

    setting: str
    cost: str
    resumable: bool = False

    def __str__(self) -> str:
        return f"{self.setting} ({self.cost})"


def is_pipeline(teacher: TeacherConfig) -> bool:
    """Whether a teacher is a diffusers pipeline."""
    return loading.is_pipeline(teacher.name)


def halved(name: str, value: int) -> list[Saving]:
    """Half as many of something at a time."""
    return [Saving(f"{name}={value // 2}", "fewer at a time")] if value > 1 else []


def of_pipeline(config: RunConfig, image_size: int) -> list[Saving]:
    """What a diffusers teacher, and a critic of it, can save; nothing for another teacher."""
    if not is_pipeline(config.teacher):
        return []
    settings, hf, critic, found = config.teacher, config.teacher.hf, "critic" in config.method.NEEDS, of_critic(config)
    if not hf.checkpointing:
        found.append(Saving("teacher.hf.checkpointing=true", "one more forward of the VAE's encoder", True))
    if settings.dtype == "float32":
        found.append(Saving("teacher.dtype=bfloat16", "for GPUs that have it"))
    if image_size >= 256:
        found.append(Saving(f"teacher.hf.size={image_size // 2}", "the teacher sees smaller images, and judges worse"))
    if not hf.slicing:
        found.append(Saving("teacher.hf.slicing=true", "one image at a time through the VAE", True))
    if not hf.offload and not critic:
        found.append(Saving("teacher.hf.offload=true", "the network travels to the GPU each step: slow", True))
    if not hf.tiling:
        found.append(Saving("teacher.hf.tiling=true", "large images in tiles, with seams", True))
    if critic and config.critic.kind == "lora" and config.critic.rank > 4:
        found.append(Saving("critic.rank=4", "the critic learns less"))
    return found


def of_critic(config: RunConfig) -> list[Saving]:
    """What a critic of a diffusers teacher can save, beside a smaller LoRA."""
    if "critic" not in config.method.NEEDS or not is_pipeline(config.teacher):
        return []
    found = []
    if config.critic.kind == "copy" and "real" not in config.method.NEEDS:  # a discriminator wants the copy
        found.append(Saving("critic.kind=lora", "the critic learns less"))
    if not config.critic.checkpointing:
        found.append(Saving("critic.checkpointing=true", "one more forward of the network in the critic's fit", True))
    return found
