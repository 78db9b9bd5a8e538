"""Recognises weight files of other kinds by their header, and says how to use them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

from sds3d.runtime.files import from_json

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
ORIGINAL = "model.diffusion_model."  # prefix of the network's tensors in Stable Diffusion's original format
LARGEST = 100_000_000  # bytes of a header, the limit of safetensors itself


def explain(path: Path) -> str:
    """Return why a weight file is not a teacher of this project, from its header alone; "" for a teacher or a damaged
    file."""
    if path.suffix.lower() in PICKLES:
        return (
            f"{path} is a pickle, which can run any program it carries, so it is not read: get the same model as "
            "safetensors, or as a diffusers pipeline's folder"
        )
    names = _names(path)

    def has(*parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    if has("lora_up", "lora_down", "lora_A", "lora_B"):
        return f"{path} is a LoRA, changes to a model: give the model, as a diffusers pipeline's folder"
    if has("control_model.", "controlnet_cond_embedding"):
        return f"{path} is a ControlNet, which steers a model: give the model, as a diffusers pipeline's folder"
    if has(ORIGINAL, "double_blocks.", "joint_blocks."):
        return _convert(path, _class_of(has), has("first_stage_model.", "cond_stage_model.", "conditioner.embedders."))
    if has("down_blocks.", "transformer_blocks.", "encoder.mid_block.", "text_model.encoder.", "encoder.block."):
        return f"{path} is one part of a diffusers pipeline: give the pipeline's folder, which has model_index.json"
    return ""


def _names(path: Path) -> list[str]:
    """Return the names of the tensors in a safetensors file; none if it is damaged."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            return list(from_json(file.read(size).decode())) if size <= LARGEST else []
    except (OSError, struct.error, ValueError, TypeError):
        return []


def _class_of(has: Callable[..., bool]) -> str:
    """Return the diffusers class of a model in one file."""
    if has("double_blocks."):
        return "FluxPipeline"
    if has("joint_blocks."):
        return "StableDiffusion3Pipeline"
    return "StableDiffusionXLPipeline" if has("conditioner.embedders.", "label_emb.") else "StableDiffusionPipeline"


def _convert(path: Path, cls: str, complete: bool) -> str:
    """Return how to convert a model in one file to a pipeline's folder."""
    folder = path.with_suffix("")
    alone = "" if complete else ", which may lack its text encoders and its VAE"
    return (
        f"{path} is a whole model in one file (of {cls}){alone}; a teacher is a folder, and diffusers makes one of it, "
        f'once and with a network for the small files that say how it is built: python -c "import diffusers; '
        f"diffusers.{cls}.from_single_file('{path}').save_pretrained('{folder}')\"; then give --teacher {folder}"
    )
