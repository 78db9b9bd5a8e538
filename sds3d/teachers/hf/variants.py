"""Chooses the weight files of a pipeline: a folder may hold several variants of each part's weights, such as fp16."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sds3d.teachers.base import HFConfig


def file_options(settings: HFConfig, variant: str = "") -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that choose the weight files of a part."""
    return {"variant": variant or None, "use_safetensors": None if settings.allow_pickle else True}


def variants_of(folder: Path, parts: Sequence[str], settings: HFConfig) -> dict[str, str]:
    """Choose the variant of each part's weights, such as "fp16", or "" for the plain weights.

    A part that has the variant of the settings gets it; other parts get their plain weights. If the settings name no
    variant and some parts have no plain weights, these get the only variant that they have, with a warning.

    Args:
        parts: names of the parts' folders.

    Raises:
        ValueError: a part has no weights, no part has the variant, or there are several to choose from.
    """
    available = {name: _variants(folder / name, settings.allow_pickle) for name in parts}
    for name, variants in available.items():
        if not variants:
            raise ValueError(
                f"the pipeline in {folder} cannot be loaded: {folder / name} holds no weights; is it missing or "
                "damaged? Of a model on the hub that has another precision only, name that: teacher.hf.variant=fp16"
            )
    wanted, others = settings.variant, sorted(set().union(*available.values()) - {""})
    if wanted and wanted not in others:
        remedy = f"there is {', '.join(others)}" if others else "leave it out"
        raise ValueError(f"teacher.hf.variant is {wanted!r}, which no part in {folder} has; {remedy}")
    lacking = [name for name, variants in available.items() if not variants & {"", wanted}]
    if lacking and wanted:
        raise ValueError(
            f"{folder} holds neither plain weights nor {wanted} of {', '.join(lacking)}; there is {', '.join(others)}"
        )
    if lacking:
        wanted = _only_variant(folder, available, lacking)
        warnings.warn(
            f"{folder} has only {wanted} weights of {', '.join(lacking)}, and they are taken; teacher.hf.variant="
            f"{wanted} takes them without this warning",
            stacklevel=3,
        )
        return {name: wanted if name in lacking else "" for name in available}
    return {name: wanted if wanted in variants else "" for name, variants in available.items()}


def _only_variant(folder: Path, available: dict[str, set[str]], lacking: list[str]) -> str:
    """Return the one variant that all ``lacking`` parts have. Raises ValueError if there are several, or none."""
    shared = sorted(set.intersection(*(available[name] for name in lacking)))
    if len(shared) == 1:
        return shared[0]
    every = sorted(set().union(*(available[name] for name in lacking)))
    raise ValueError(
        f"{folder} has no plain weights of {', '.join(lacking)}, but {', '.join(every)}: say which to take, as in "
        f"teacher.hf.variant={'fp16' if 'fp16' in every else every[0]}"
    )


def _variants(folder: Path, pickles: bool) -> set[str]:
    """Return the variants of a part's weights, "" for the plain ones. Shards of a large file have a number before or
    after the variant."""
    kinds, shard = "safetensors|bin" if pickles else "safetensors", r"(?:-\d+-of-\d+)?"
    pattern = rf"(?:diffusion_pytorch_model|pytorch_model|model){shard}(?:\.([\w-]+?))?{shard}\.(?:{kinds})"
    matches = (re.fullmatch(pattern, file.name) for file in folder.glob("*"))
    return {match[1] or "" for match in matches if match}
