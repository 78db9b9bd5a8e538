"""What a run that paints images is built of, where it differs from other runs."""

from __future__ import annotations

import torch

from sds3d.config.schema import PaintConfig
from sds3d.runs.memory_savings import Saving, halved, of_pipeline
from sds3d.runtime.device import pick_device
from sds3d.runtime.distributed import Processes
from sds3d.students.image import ImageStudent
from sds3d.teachers.base import Teacher


def build_student(config: PaintConfig, teacher: Teacher | None, processes: Processes) -> ImageStudent:
    """New images. Raises ValueError for a picture to begin from that cannot be read."""
    rng = torch.Generator().manual_seed(2 * config.seed + 1)  # the loop's own stream is 2 * seed
    return ImageStudent(config.image, config.prompt, rng, pick_device(config.device))


def savings(config: PaintConfig, image_size: int) -> list[Saving]:
    """What can be set to save memory, in the usual order of effect; see `Kind.savings`."""
    return [*of_pipeline(config, image_size), *halved("image.count", config.image.count)]


def usual_savings(config: PaintConfig) -> tuple[list[str], str]:
    """Of a packaged teacher's run that is out of memory: what it can take up where it stopped, and all in words."""
    return [], "lower image.count"
