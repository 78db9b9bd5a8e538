"""A pipeline as its settings files describe it: every part in shape, none in memory. Weights are neither read nor
downloaded; what such a teacher does is what `sds3d.runtime.memory.Meter` counts."""

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
from sds3d.teachers.hf.teacher import DiffusersTeacher
from sds3d.teachers.hf.words import Condition

FILES = (INDEX, "config.json", "*/config.json", "*scheduler_config.json")  # all that a sketch is made from
CLIP_TOKENS = 77  # where the files do not say


def build_meta_teacher(settings: TeacherConfig, dtype: torch.dtype) -> tuple[DiffusersTeacher, list[nn.Module]]:
    """What a pipeline's settings files describe, in this precision: a teacher whose weights are on torch's meta device
    (see `sds3d.runtime.memory.hollow`), never offloaded, and its text encoders, there too.

    Raises:
        ValueError: the hub cannot be reached or says no, the pipeline is of no family we know, a file is missing or
            damaged, or an option is not for it.
    """
    folder = _settings_files(settings.name)
    kind = kind_of(folder, settings.name)
    plain = dataclasses.replace(settings.hf, offload=False)
    with quiet(), loading_errors(folder):
        pipe, encoders, tokens = _pipeline(kind, folder, dtype)
    family = family_of(kind, pipe, plain)
    place_parts(family, plain, torch.device("meta"), dtype)
    return DiffusersTeacher(
        family, _ZeroEmbedder(family.condition_shapes(tokens), dtype), settings.views, dtype
    ), encoders


class _ZeroEmbedder:
    """Stands in for `sds3d.teachers.hf.words.PromptEmbedder`: conditions of the right shape."""

    device, all_views = torch.device("cpu"), True

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype):
        self.shapes, self.dtype = shapes, dtype

    def expect(self, prompt: str) -> None:
        """Nothing: nothing is embedded."""

    def __call__(self, prompts: Sequence[str]) -> Condition:
        return {name: torch.zeros(len(prompts), *shape, dtype=self.dtype) for name, shape in self.shapes.items()}

    def with_cameras(self, prompts: Sequence[str], cameras: Cameras, camera_mask: Tensor | None = None) -> Condition:
        return self(prompts)


def _settings_files(name: str) -> Path:
    """The folder with a pipeline's settings; of what is on the hub they alone are downloaded. Raises ValueError."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    with hub_errors(name):
        return Path(snapshot_download(name, allow_patterns=list(FILES)))


def _pipeline(kind: type[Family], folder: Path, dtype: torch.dtype) -> tuple[Any, list[nn.Module], int]:
    """The pipeline without its text encoders, on torch's meta device; these, and the tokens a CLIP reads."""
    import diffusers
    import transformers

    def part(name: str, cls: str, exact: torch.dtype) -> Any:
        told = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
        with torch.device("meta"):
            return getattr(diffusers, cls).from_config(told).to(exact)

    if not (folder / INDEX).is_file():
        scheduler: Any = diffusers.DDPMScheduler.from_pretrained(folder)
        return diffusers.DDPMPipeline(part("", "UNet2DModel", dtype), scheduler), [], 0
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    classes = {name: what[1] for name, what in index.items() if isinstance(what, list) and what[1]}
    parts = {name: part(name, classes[name], dtype) for name in (kind.PART, "vae") if name in classes}
    if kind.UPCAST:
        parts["vae"].float()
    parts["scheduler"] = getattr(diffusers, classes["scheduler"]).from_pretrained(folder / "scheduler")
    encoders, tokens = [], CLIP_TOKENS
    for name in filter(classes.get, kind.ENCODERS):
        kind_of_encoder = getattr(transformers, classes[name])
        config = kind_of_encoder.config_class.from_pretrained(folder / name)
        tokens = getattr(config, "max_position_embeddings", tokens)
        with torch.device("meta"):
            encoders.append(kind_of_encoder(config).to(dtype))
    rest = omitted_parts(folder, [name for name in classes if name not in parts])
    return class_for(kind)(**parts, **rest), encoders, tokens
