"""The parts of a run that are particular to scenes."""

from __future__ import annotations

import dataclasses
import math
import warnings

import torch

from sds3d import ops
from sds3d.cameras import Cameras
from sds3d.config.load import name_of, plain
from sds3d.config.recipes import recipe
from sds3d.config.schema import Config
from sds3d.prompts import COLOURS, VIEW_WORDS, named_background, named_view, words
from sds3d.runs.memory_savings import Saving, of_pipeline
from sds3d.runtime.device import pick_device
from sds3d.runtime.distributed import Processes
from sds3d.runtime.errors import stacklevel
from sds3d.students.base import Particles
from sds3d.students.representation import Scene
from sds3d.students.scene.student import BACKGROUNDS, SceneConfig, SceneStudent
from sds3d.teachers.base import HasVocabulary, NormalsConfig, Teacher, answerer, domains_of, views_per_set
from sds3d.teachers.by_domain import ByDomain
from sds3d.teachers.hf import loading


def check(config: Config) -> None:
    """Raise ValueError if the prompt names a view, or the teacher of normals has nothing to do.

    Warn if a pipeline's prompt has words that may name a view.
    """
    if config.teacher.normals != NormalsConfig() and max(config.domains.normals.v0, config.domains.normals.v1) == 0:
        raise ValueError(
            "teacher.normals answers for images of normals, and no step shows them: give domains.normals=0.3, the "
            "fraction of the steps that do, or leave teacher.normals out"
        )
    if view := named_view(config.prompt):
        raise ValueError(f"the prompt says {view!r}, but a scene is seen from all sides; leave it out")
    views = [view for view in VIEW_WORDS if view in " ".join(words(config.prompt))]
    if views and loading.is_pipeline(config.teacher.name):
        warnings.warn(
            f"the prompt has the words {views[0]!r}, taken as part of the object; if they mean where it is seen from, "
            "leave them out: a scene is seen from all sides",
            stacklevel=3,
        )


def check_teacher(config: Config, teacher: Teacher) -> None:
    """Raise ValueError if a teacher cannot teach this scene.

    It must know cameras or view words. A multi-view teacher needs rings of as many cameras as it judges at once. The
    same holds for the teacher that answers for normals.
    """
    _check_one(config, config.teacher.name, answerer(teacher, "colours"))
    if (other := teacher.normals if isinstance(teacher, ByDomain) else teacher) is not answerer(teacher, "colours"):
        _check_one(config, config.teacher.normals.name or type(other).__name__, other)


def _check_one(config: Config, name: str, teacher: Teacher) -> None:
    known = teacher.vocabulary if isinstance(teacher, HasVocabulary) else None
    if teacher.views == "words" and known is not None and not {"front", "back", "view"} <= set(known):
        raise ValueError(
            f"the teacher {name} knows neither cameras nor view words, which a scene needs; it can "
            "paint (sds3d paint) and teach a generator (sds3d distill)"
        )
    views = views_per_set(teacher)
    if teacher.views == "camera" and config.camera.ring % views:
        raise ValueError(
            f"the teacher {name} judges {views} views of a scene at once: give "
            f"camera.ring={views} and render.views={views}, or a multiple"
        )


def for_teacher(config: Config, teacher: Teacher) -> Config:
    """Return the config without the domains that the teacher does not know.

    Warns about those that the user asked for. Those of the recipe are for the packaged teacher, and another one may
    know colours only.
    """
    known = config.domains.known(domains_of(teacher))
    usual = recipe(name_of(config.method), pipeline=loading.is_pipeline(config.teacher.name)).get("domains", {})
    changed = [f.name for f in dataclasses.fields(known) if getattr(known, f.name) != getattr(config.domains, f.name)]
    missing = [name for name in changed if plain(getattr(config.domains, name)) != usual.get(name)]
    if missing:
        warnings.warn(
            f"the teacher {config.teacher.short_name} knows {', '.join(domains_of(teacher))} only: "
            f"domains.{' and domains.'.join(missing)} have no effect, and these steps show colours",
            stacklevel=stacklevel(),
        )
    return dataclasses.replace(config, domains=known)


def further_prompts(config: Config) -> list[tuple[str, str]]:
    """Return the prompts with view words and background colours that a teacher must know, see `Kind`."""
    prompts = [(f"{view}: ", f"{config.prompt}, {view}") for view in VIEW_WORDS if config.teacher.views == "words"]
    if config.render.background == "random" and not named_background(config.prompt):
        for name in list(BACKGROUNDS)[1:]:
            prompts.append((f"on {name}: ", f"{config.prompt} on a {name} background"))
    return prompts


def build_student(config: Config, teacher: Teacher | None, processes: Processes) -> Scene | Particles:
    """Build a new scene, or one for each of the method's particles. The same seed builds the same scenes."""
    rng = torch.Generator().manual_seed(2 * config.seed + 1)  # the training loop's seed is 2 * seed
    if config.particles == 1:
        return build_scene(config, rng)
    seeds = torch.randint(2**62, (config.particles,), generator=rng).tolist()
    return Particles([build_scene(config, torch.Generator().manual_seed(seed)) for seed in seeds])


def build_scene(config: Config, rng: torch.Generator) -> SceneStudent:
    """Build a new scene. A background colour that the prompt names replaces white as the default background."""
    device, render, named = pick_device(config.device), config.render, named_background(config.prompt)
    default = named or "white"
    if named:
        if render.background not in ("white", "learned", named):
            raise ValueError(f"the prompt names a {named} background and render.background is {render.background}")
        render = dataclasses.replace(render, background=named)
    settings = SceneConfig(config.field, config.occupancy, render, config.camera, config.domains, config.regularise)

    def prompts(cameras: Cameras, background: str) -> list[str]:
        is_colour_name = background.isalpha() and background not in (default, "learned")
        return [f"{config.prompt} on a {background} background" if is_colour_name else config.prompt] * len(cameras)

    backgrounds = {named: COLOURS[named]} if named else None
    return SceneStudent(settings, rng, prompts, backgrounds, ops.choose(device, config.backend), device)


def savings(config: Config, image_size: int) -> list[Saving]:
    """Return settings that save memory, usually the most effective first; see `Kind.savings`."""
    of_teacher, of_scene = of_pipeline(config, image_size), []
    render, ring = config.render, config.camera.ring
    if of_teacher and render.views > ring:
        of_scene.append(Saving(f"render.views={ring}", "a noisier gradient"))
    chunk = Saving("render.chunk=4096", "rays at a time: a quarter slower", True)
    of_scene += [] if 0 < render.chunk <= 4096 else [chunk]
    if not of_teacher and render.views > ring:
        half = max(1, render.views // ring // 2) * ring
        of_scene.append(Saving(f"render.views={half}", "a noisier gradient"))
    pixels = render.resolution_at(math.inf)
    if pixels >= (128 if of_teacher else 8):
        of_scene.append(Saving(f"render.resolution={pixels // 2}", "coarser views"))
    return [*of_teacher, *of_scene]


def usual_savings(config: Config) -> tuple[list[str], str]:
    """Return the advice for a packaged teacher that runs out of memory; see `Kind.usual_savings`."""
    chunk = "render.chunk (rays at a time, 65536 or less), render.views, render.resolution"
    return ["render.chunk=4096"] if config.render.chunk != 4096 else [], f"lower {chunk}"
