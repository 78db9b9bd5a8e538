"""Loads a teacher by name: packaged weights, the file or folder of a training, or a diffusers pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sds3d.runtime.device import pick_device
from sds3d.teachers import small
from sds3d.teachers.base import OBJECT, PACKAGED, HFConfig, NormalsConfig, TeacherConfig
from sds3d.teachers.by_domain import ByDomain
from sds3d.teachers.hf import loading
from sds3d.teachers.hf.generator import CARD, read
from sds3d.teachers.hf.teacher import DiffusersTeacher

Loaded = small.SmallTeacher | DiffusersTeacher  # what `load_teacher` returns


def load_by_domain(settings: TeacherConfig, device: str = "auto") -> Loaded | ByDomain:
    """Load a frozen teacher with the one that answers for normals, if the settings name one or its words.

    Settings of diffusers pipelines are for those of the two that are pipelines.

    Raises:
        ValueError: see `load_teacher`.
    """
    if settings.normals == NormalsConfig():
        return load_teacher(settings, device)
    names = [settings.name, *filter(None, [settings.normals.name])]
    loaded = []
    for name in names:
        own = replace(settings, name=name, normals=NormalsConfig())
        if not loading.is_pipeline(name) and any(map(loading.is_pipeline, names)):
            own = replace(own, hf=HFConfig(), dtype="auto" if own.dtype == "float16" else own.dtype)
        try:
            loaded.append(load_teacher(own, device))
        except ValueError as error:
            raise ValueError(f"teacher.normals.name: {error}" if loaded else str(error)) from error
    return ByDomain(*loaded, words=settings.normals.words)


def load_teacher(settings: TeacherConfig, device: str = "auto") -> Loaded:
    """Load one frozen teacher. A generator that still denoises can be a teacher as well.

    Raises:
        ValueError: there is no teacher of that name, its weights are damaged, it is a generator that does not denoise,
            or the settings have a teacher for normals, which is for `load_by_domain`.
    """
    if settings.normals != NormalsConfig():
        raise ValueError("teacher.normals is for the runs of scenes, which show normals: leave teacher.normals out")
    if settings.name.startswith(OBJECT):
        raise ValueError(
            f"the teacher was an object in Python ({settings.name.removeprefix(OBJECT)}), which cannot be loaded by a "
            "name: give an object of this class, as in sds3d.resume(run, teacher=...), or for the command line "
            "sds3d.cli.main(teacher=...)"
        )
    if loading.is_pipeline(settings.name):
        folder = Path(settings.name).expanduser()
        if (folder / CARD).is_file():
            _require_denoiser(settings.name, read(folder))
        return loading.load(settings, pick_device(device))
    path = small.packaged(settings.name) if settings.name in PACKAGED else Path(settings.name).expanduser()
    if path.is_dir():
        path = path / small.FILE
    if not path.is_file():
        raise ValueError(
            f"teacher {settings.name!r} is neither packaged ({', '.join(PACKAGED)}), a file of weights, the folder of "
            "a training (sds3d teacher train) or of a diffusers pipeline, nor an id on the hub (owner/model)"
        )
    if settings.hf != HFConfig() or settings.dtype == "float16":
        raise ValueError(
            f"teacher.hf and float16 are for diffusers pipelines, and {settings.name!r} is none: a folder with "
            f"{loading.INDEX}, or an id on the hub such as owner/model"
        )
    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    teacher = small.load(path, settings.views, pick_device(device), dtype, settings.compile)
    if "generator" in teacher.header:
        _require_denoiser(str(path), teacher.header)
    return teacher


def _require_denoiser(name: str, header: Mapping[str, Any]) -> None:
    """Raise ValueError if a generator's header does not say that it denoises. No generator of an older version, whose
    header has no such entry, does."""
    if header.get("denoiser") != "true":
        raise ValueError(
            f"{name} is a generator, which paints by itself (sds3d sample) and is no denoiser any more: name the "
            "teacher it was distilled from"
        )
