"""Which files of a pipeline's weights are read: a folder may hold each part's in several variants, such as fp16."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sds3d.teachers.base import HFConfig


def file_options(settings: HFConfig, variant: str = "") -> dict[str, Any]:
    """How diffusers is told which of a part's files to read."""
    return {"variant": variant or None, "use_safetensors": None if settings.allow_pickle else True}


def variants_of(folder: Path, parts: Sequence[str], settings: HFConfig) -> dict[str, str]:
    """The variant of each part's weights, as "fp16", "" where it is the plain one.

    What the settings name is taken where a part has it, else its plain weights. Where they name none and parts have
    no plain weights, the only variant of these is taken, and a warning says so.

    Args:
        parts: names of their folders.

    Raises:
        ValueError: a part without weights, a variant that no part has, or several to choose from.
    """
    there = {name: _variants(folder / name, settings.allow_pickle) for name in parts}
    for name, found in there.items():
        if not found:
            raise ValueError(
                f"the pipeline in {folder} cannot be loaded: {folder / name} holds no weights; is it missing or "
                "damaged? Of a model on the hub that has another precision only, name that: teacher.hf.variant=fp16"
            )
    wanted, others = settings.variant, sorted(set().union(*there.values()) - {""})
    if wanted and wanted not in others:
        what = f"there is {', '.join(others)}" if others else "leave it out"
        raise ValueError(f"teacher.hf.variant is {wanted!r}, which no part in {folder} has; {what}")
    lacking = [name for name, found in there.items() if not found & {"", wanted}]
    if lacking and wanted:
        raise ValueError(
            f"{folder} holds neither plain weights nor {wanted} of {', '.join(lacking)}; there is {', '.join(others)}"
        )
    if lacking:
        wanted = _only(folder, there, lacking)
        warnings.warn(
            f"{folder} has only {wanted} weights of {', '.join(lacking)}, and they are taken; teacher.hf.variant="
            f"{wanted} takes them without this warning",
            stacklevel=3,
        )
        return {name: wanted if name in lacking else "" for name in there}
    return {name: wanted if wanted in found else "" for name, found in there.items()}


def _only(folder: Path, there: dict[str, set[str]], lacking: list[str]) -> str:
    """The one variant that all these parts have. Raises ValueError where there are more, or none."""
    shared = sorted(set.intersection(*(there[name] for name in lacking)))
    if len(shared) == 1:
        return shared[0]
    every = sorted(set().union(*(there[name] for name in lacking)))
    raise ValueError(
        f"{folder} has no plain weights of {', '.join(lacking)}, but {', '.join(every)}: say which to take, as in "
        f"teacher.hf.variant={'fp16' if 'fp16' in every else every[0]}"
    )


def _variants(folder: Path, pickles: bool) -> set[str]:
    """Of a part's weights, "" for the plain ones; pieces of a large file have a number, before the variant or after."""
    kinds, piece = "safetensors|bin" if pickles else "safetensors", r"(?:-\d+-of-\d+)?"
    pattern = rf"(?:diffusion_pytorch_model|pytorch_model|model){piece}(?:\.([\w-]+?))?{piece}\.(?:{kinds})"
    found = (re.fullmatch(pattern, file.name) for file in folder.glob("*"))
    return {match[1] or "" for match in found if match}
