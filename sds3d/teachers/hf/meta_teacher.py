"""Teachers on torch's meta device, built from a pipeline's configuration files: shapes without memory.

Weights are neither read nor downloaded. `sds3d.runtime.memory.Meter` counts the memory that such a teacher would use.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sds3d.cameras import Cameras
from sds3d.teachers.base import TeacherConfig
from sds3d.teachers.hf.families import Family
from sds3d.teachers.hf.loading import (
    INDEX,
    class_for,
    family_of,
    hub_errors,
    kind_of,
    loading_errors,
    omitted_parts,
    place_parts,
    quiet,
)
from sds3d.teachers.hf.prompt_embedder import Condition
from sds3d.teachers.hf.teacher import DiffusersTeacher

FILES = (INDEX, "config.json", "*/config.json", "*scheduler_config.json")  # the configuration files
CLIP_TOKENS = 77  # if the files do not say


def build_meta_teacher(settings: TeacherConfig, dtype: torch.dtype) -> tuple[DiffusersTeacher, list[nn.Module]]:
    """Build a teacher and its text encoders on torch's meta device from a pipeline's configuration files.

    The weights have this dtype; see `sds3d.runtime.memory.use_fake_tensors`. The network is never offloaded.

    Raises:
        ValueError: the hub cannot be reached or refuses, the pipeline is of an unknown family, a file is missing or
            damaged, or an option does not apply to the pipeline.
    """
    folder = _config_folder(settings.name)
    kind = kind_of(folder, settings.name)
    hf = dataclasses.replace(settings.hf, offload=False)
    with quiet(), loading_errors(folder):
        pipe, encoders, tokens = _pipeline(kind, folder, dtype)
    family = family_of(kind, pipe, hf)
    place_parts(family, hf, torch.device("meta"), dtype)
    return DiffusersTeacher(
        family, _ZeroEmbedder(family.condition_shapes(tokens), dtype), settings.views, dtype
    ), encoders


class _ZeroEmbedder:
    """A stand-in for `sds3d.teachers.hf.prompt_embedder.PromptEmbedder` that returns zeros of the right shape."""

    device, all_views = torch.device("cpu"), True

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype):
        self.shapes, self.dtype = shapes, dtype

    def expect(self, prompt: str) -> None:
        """Do nothing."""

    def __call__(self, prompts: Sequence[str]) -> Condition:
        return {name: torch.zeros(len(prompts), *shape, dtype=self.dtype) for name, shape in self.shapes.items()}

    def with_cameras(self, prompts: Sequence[str], cameras: Cameras, camera_mask: Tensor | None = None) -> Condition:
        return self(prompts)


def _config_folder(name: str) -> Path:
    """Return the folder of a pipeline's configuration files. Downloads them, without weights, from the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    with hub_errors(name):
        return Path(snapshot_download(name, allow_patterns=list(FILES)))


def _pipeline(kind: type[Family], folder: Path, dtype: torch.dtype) -> tuple[Any, list[nn.Module], int]:
    """Return the pipeline without its text encoders, these, both on torch's meta device, and a CLIP's token limit."""
    import diffusers
    import transformers

    def part(name: str, cls: str) -> Any:
        config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
        with torch.device("meta"):
            return getattr(diffusers, cls).from_config(config).to(dtype)

    if not (folder / INDEX).is_file():
        scheduler: Any = diffusers.DDPMScheduler.from_pretrained(folder)
        return diffusers.DDPMPipeline(part("", "UNet2DModel"), scheduler), [], 0
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    classes = {name: what[1] for name, what in index.items() if isinstance(what, list) and what[1]}
    parts = {name: part(name, classes[name]) for name in (kind.PART, "vae") if name in classes}
    if kind.UPCAST:
        parts["vae"].float()
    parts["scheduler"] = getattr(diffusers, classes["scheduler"]).from_pretrained(folder / "scheduler")
    encoders, tokens = [], CLIP_TOKENS
    for name in filter(classes.get, kind.ENCODERS):
        encoder_class = getattr(transformers, classes[name])
        config = encoder_class.config_class.from_pretrained(folder / name)
        tokens = getattr(config, "max_position_embeddings", tokens)
        with torch.device("meta"):
            encoders.append(encoder_class(config).to(dtype))
    omitted = omitted_parts(folder, [name for name in classes if name not in parts])
    return class_for(kind)(**parts, **omitted), encoders, tokens
