"""Settings that make a run take less memory: what is still open, what each costs, and which of them make a run fit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sds3d.config import load as configs
from sds3d.config.load import Config, DistillConfig, PaintConfig, RunConfig
from sds3d.config.typed import plain
from sds3d.runs.memory_estimate import Place, estimate, is_pipeline

LEAST = 0.01  # a setting that saves a smaller share than this of the peak is not worth its line


@dataclass(frozen=True)
class Saving:
    """A setting, key=value, and what it costs.

    Args:
        resumable: whether a run may take it up where it stopped.
    """

    setting: str
    cost: str
    resumable: bool = False

    def __str__(self) -> str:
        return f"{self.setting} ({self.cost})"


@dataclass(frozen=True)
class Advice:
    """
    Args:
        savings: settings to take together, the most effective first, and the peak in bytes with it and all before it.
        fits: whether they suffice.
    """

    savings: list[tuple[Saving, int]]
    fits: bool


def open_to(config: RunConfig, image_size: int = 0) -> list[Saving]:
    """What a run can still be told to save memory, in the usual order of effect.

    Args:
        image_size: what its teacher sees, pixels a side.
    """
    if isinstance(config, DistillConfig):
        critic = _of_critic(config) if is_pipeline(config.teacher) else []
        pairs = _halved("pairs.batch", config.pairs.batch) if "pairs" in config.method.NEEDS else []
        return [*critic, *_halved("generator.batch", config.generator.batch), *pairs]
    teacher = _of_pipeline(config, image_size) if is_pipeline(config.teacher) else []
    if isinstance(config, PaintConfig):
        return [*teacher, *_halved("image.count", config.image.count)]
    told, ring, found = config.render, config.camera.ring, []
    if teacher and told.views > ring:
        found.append(Saving(f"render.views={ring}", "a noisier gradient"))
    chunk = Saving("render.chunk=4096", "rays at a time: a quarter slower", True)
    found += [] if 0 < told.chunk <= 4096 else [chunk]
    if not teacher and told.views > ring:
        half = max(1, told.views // ring // 2) * ring
        found.append(Saving(f"render.views={half}", "a noisier gradient"))
    pixels = told.resolution_at(math.inf)
    if pixels >= (128 if teacher else 8):
        found.append(Saving(f"render.resolution={pixels // 2}", "coarser views"))
    return [*teacher, *found]


def _halved(name: str, value: int) -> list[Saving]:
    """Half as many of something at a time."""
    return [Saving(f"{name}={value // 2}", "fewer at a time")] if value > 1 else []


def _of_pipeline(config: RunConfig, image_size: int) -> list[Saving]:
    """What is open to a diffusers teacher, and to a critic of it."""
    told, hf, critic, found = config.teacher, config.teacher.hf, "critic" in config.method.NEEDS, _of_critic(config)
    if not hf.checkpointing:
        found.append(Saving("teacher.hf.checkpointing=true", "one more forward of the VAE's encoder", True))
    if told.dtype == "float32":
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


def _of_critic(config: RunConfig) -> list[Saving]:
    """What is open to a critic of a diffusers teacher, the rank of its LoRA aside."""
    if "critic" not in config.method.NEEDS:
        return []
    found = []
    if config.critic.kind == "copy" and "real" not in config.method.NEEDS:  # a discriminator wants the copy
        found.append(Saving("critic.kind=lora", "the critic learns less"))
    if not config.critic.checkpointing:
        found.append(Saving("critic.checkpointing=true", "one more forward of the network in the critic's fit", True))
    return found


def advise(config: Config, where: Place, image_size: int) -> Advice:
    """What makes a run fit, or comes nearest to it: single effects are measured, then added up in their order."""
    peak = estimate(config, where).peak
    tried = [(saving, _peak(config, [saving], where)) for saving in open_to(config, image_size)]
    taken: list[Saving] = []
    found: list[tuple[Saving, int]] = []
    for saving, _ in sorted(tried, key=lambda pair: pair[1]):
        if peak <= where.size:
            break
        now = _peak(config, [*taken, saving], where)
        if now < (1 - LEAST) * peak:
            peak = now
            taken.append(saving)
            found.append((saving, peak))
    return Advice(found, peak <= where.size)


def _peak(config: Config, savings: list[Saving], where: Place) -> int:
    return estimate(_changed(config, savings), where).peak


def _changed(config: Config, savings: list[Saving]) -> Config:
    """The config with these settings."""
    values = plain(config)
    values["method"] = {"name": configs.name_of(config.method), **values["method"]}
    return configs.load(None, values, configs.parse_overrides([s.setting for s in savings]), kind=Config)
