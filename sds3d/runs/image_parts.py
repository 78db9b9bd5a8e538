"""The parts of a run that are particular to images."""

from __future__ import annotations

import torch

from sds3d.config.schema import PaintConfig
from sds3d.runs.memory_savings import Saving, halved, of_pipeline
from sds3d.runtime.device import pick_device
from sds3d.runtime.distributed import Processes
from sds3d.students.image import ImageStudent
from sds3d.teachers.base import Teacher


def build_student(config: PaintConfig, teacher: Teacher | None, processes: Processes) -> ImageStudent:
    """Build the images of a new run. Raises ValueError if the picture to begin from cannot be read."""
    rng = torch.Generator().manual_seed(2 * config.seed + 1)  # the training loop's seed is 2 * seed
    return ImageStudent(config.image, config.prompt, rng, pick_device(config.device))


def savings(config: PaintConfig, image_size: int) -> list[Saving]:
    """Return settings that save memory, usually the most effective first; see `Kind.savings`."""
    return [*of_pipeline(config, image_size), *halved("image.count", config.image.count)]


def usual_savings(config: PaintConfig) -> tuple[list[str], str]:
    """Return the advice for a packaged teacher that runs out of memory; see `Kind.usual_savings`."""
    return [], "lower image.count"
