"""Generators distilled from a diffusers pipeline, saved as the folder of a pipeline with a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sds3d.runtime.files import from_json, read_text, replacing_folder
from sds3d.teachers.hf.generator_scheduler import build_scheduler
from sds3d.teachers.hf.teacher import DiffusersTeacher

CARD = "generator.json"  # in the pipeline's folder; holds what sds3d needs and diffusers does not


def read(folder: Path) -> dict[str, Any]:
    """Read the card of a generator's pipeline.

    Raises:
        ValueError: it is damaged: an entry is missing or has another type than `save` writes.
    """
    try:
        card = from_json(read_text(folder / CARD))
        if not isinstance(card, dict):
            raise ValueError("it is no object")
        for key in ("generator", "teacher", "method", "steps", "prompts", "call"):
            if not isinstance(card.get(key), str):
                raise ValueError(f"{key} is {card.get(key)!r}, and should be text")
        if not isinstance(card.get("hf"), dict):
            raise ValueError(f"hf is {card.get('hf')!r}, and should be settings")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / CARD} is damaged ({error}); train the generator again") from error
    return card


def _as_float32(config_file: Path) -> None:
    """Set the default dtype of a text encoder to float32, the default of diffusers' own parts, so that they match."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config_file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2), encoding="utf-8")


def save(teacher: DiffusersTeacher, state: dict[str, Tensor], times: Tensor, card: dict[str, Any], path: Path) -> None:
    """Write the teacher's pipeline with a generator's weights and scheduler, in the teacher's dtype.

    Args:
        state: weights of a network of the teacher's form.
        times: the t (K,) of the generator's steps.
        card: entries of the card; "call" and "hf" are added.
        path: folder to write.

    Raises:
        ValueError: the teacher's files are gone, or the disk is full. An existing ``path`` stays unchanged.
    """
    from safetensors import SafetensorError

    family, side = teacher.family, teacher.shape[-1]
    state = {name: value.detach().to("cpu", teacher.dtype).contiguous() for name, value in state.items()}
    config = dict(family.network.config)
    family.adapt(config, state, side)
    with torch.device("meta"):
        network = type(family.network).from_config(config)
    zeros = {name: torch.zeros(like.shape, dtype=teacher.dtype) for name, like in network.state_dict().items()}
    network.load_state_dict({**zeros, **state}, assign=True)  # weights that ``adapt`` adds are 0
    scheduler = build_scheduler(family, teacher.levels, float(times[0]), len(times))
    hf = {"size": family.settings.size, "embedded_guidance": family.settings.embedded_guidance}
    card = {**card, "call": family.call_arguments(len(times), teacher.image_size), "hf": hf}
    with replacing_folder(path) as folder, teacher.full_pipeline() as pipe:
        pipe.register_modules(**{family.PART: network, "scheduler": scheduler})
        try:
            pipe.save_pretrained(folder)
        except SafetensorError as error:
            raise ValueError(f"cannot write {path}: {error}; make room, or name another place (out=FOLDER)") from error
        for config_file in (file for name in family.ENCODERS for file in folder.glob(f"{name}/config.json")):
            _as_float32(config_file)
        (folder / CARD).write_text(json.dumps(card, indent=1), encoding="utf-8")
