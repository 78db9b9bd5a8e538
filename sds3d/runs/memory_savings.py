"""Settings that save memory, and the cost of each."""

from __future__ import annotations

from dataclasses import dataclass

from sds3d.config.schema import RunConfig
from sds3d.teachers.base import TeacherConfig
from sds3d.teachers.hf import loading


@dataclass(frozen=True)
class Saving:
    """A setting that saves memory.

    Args:
        setting: the setting, as KEY=VALUE.
        cost: its disadvantage, in words.
        resumable: whether a stopped run can be resumed with it.
    """

    setting: str
    cost: str
    resumable: bool = False

    def __str__(self) -> str:
        return f"{self.setting} ({self.cost})"


def is_pipeline(teacher: TeacherConfig) -> bool:
    """Return whether a teacher is a diffusers pipeline."""
    return loading.is_pipeline(teacher.name)


def halved(name: str, value: int) -> list[Saving]:
    """Return the setting that halves a count; none if it is 1."""
    return [Saving(f"{name}={value // 2}", "fewer at a time")] if value > 1 else []


def of_pipeline(config: RunConfig, image_size: int) -> list[Saving]:
    """Return the settings of a diffusers teacher and its critic that save memory; none for another teacher."""
    if not is_pipeline(config.teacher):
        return []
    hf, critic, savings = config.teacher.hf, "critic" in config.method.NEEDS, of_critic(config)
    if not hf.checkpointing:
        savings.append(Saving("teacher.hf.checkpointing=true", "one more forward of the VAE's encoder", True))
    if config.teacher.dtype == "float32":
        savings.append(Saving("teacher.dtype=bfloat16", "for GPUs that have it"))
    if image_size >= 256:
        cost = "the teacher sees smaller images, and judges worse"
        savings.append(Saving(f"teacher.hf.size={image_size // 2}", cost))
    if not hf.slicing:
        savings.append(Saving("teacher.hf.slicing=true", "one image at a time through the VAE", True))
    if not hf.offload and not critic:
        savings.append(Saving("teacher.hf.offload=true", "the network travels to the GPU each step: slow", True))
    if not hf.tiling:
        savings.append(Saving("teacher.hf.tiling=true", "large images in tiles, with seams", True))
    if critic and config.critic.kind == "lora" and config.critic.rank > 4:
        savings.append(Saving("critic.rank=4", "the critic learns less"))
    return savings


def of_critic(config: RunConfig) -> list[Saving]:
    """Return the settings of a diffusers teacher's critic that save memory, other than a smaller LoRA rank."""
    if "critic" not in config.method.NEEDS or not is_pipeline(config.teacher):
        return []
    savings = []
    if config.critic.kind == "copy" and "real" not in config.method.NEEDS:  # a discriminator needs the copy
        savings.append(Saving("critic.kind=lora", "the critic learns less"))
    if not config.critic.checkpointing:
        savings.append(Saving("critic.checkpointing=true", "one more forward of the network in the critic's fit", True))
    return savings
