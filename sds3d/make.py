"""Objects from a config: device, teacher, student, critic, objective."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from sds3d import ops
from sds3d.cameras import Cameras
from sds3d.config import PACKAGED_TEACHERS, Config, PaintConfig, RunConfig
from sds3d.critics import Learnt
from sds3d.distill.bridge import Bridge
from sds3d.distill.core import ScoreObjective
from sds3d.prompts import COLOURS, VIEW_WORDS, named_background, words
from sds3d.scenes.image import ImageStudent
from sds3d.scenes.student import SceneConfig, SceneStudent
from sds3d.students import Particles
from sds3d.teachers.base import Teacher, TeacherConfig


def pick_device(wanted: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises ValueError for a device that is not here."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # kernels and events go to the current one
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {wanted!r} is not usable here; give auto, cpu or cuda") from error
    return device


def load_teacher(settings: TeacherConfig, device: str = "auto") -> Teacher:
    """A frozen teacher. Raises ValueError where there is none of that name, or its weights are damaged."""
    from sds3d.teachers import small

    path = None if settings.name in PACKAGED_TEACHERS else Path(settings.name).expanduser()
    if path is not None and not path.is_file():
        packaged = ", ".join(PACKAGED_TEACHERS)
        raise ValueError(f"teacher {settings.name!r} is neither packaged ({packaged}) nor a file of weights")
    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return small.load(path, settings.views, pick_device(device), dtype, settings.compile)


def teacher(config: RunConfig) -> Teacher:
    """The config's teacher, which must know its prompts. Raises ValueError."""
    said = [view for view in VIEW_WORDS if view in " ".join(words(config.prompt))]
    if said and isinstance(config, Config):
        raise ValueError(f"the prompt says {said[0]!r}, but a scene is seen from all sides; leave it out")
    found = load_teacher(config.teacher, config.device)
    for name, prompt in (
        ("", config.prompt),
        ("negative: ", config.negative),
        ("source.prompt: ", config.source.prompt),
        ("prompt and negative together: ", _spoilt(config)),
    ):
        if prompt or not name:
            try:
                found.check(prompt)
            except ValueError as error:
                raise ValueError(f"{name}{error}") from error
    return found


def _spoilt(config: RunConfig) -> str:
    """The prompt with the words of its defects, where the method asks for that."""
    return f"{config.prompt}, {config.negative}" if isinstance(config.method, Bridge) and config.negative else ""


def student(config: RunConfig) -> SceneStudent | ImageStudent | Particles:
    """What a run trains, new; the same seed gives the same one.

    Raises:
        ValueError: a picture to begin from that cannot be read, a background that is not known.
    """
    seed = 2 * config.seed + 1  # the loop's own stream is 2 * seed
    if isinstance(config, PaintConfig):
        generator = torch.Generator().manual_seed(seed)
        return ImageStudent(config.image, config.prompt, generator, pick_device(config.device))
    assert isinstance(config, Config), config
    if config.particles == 1:
        return scene(config, torch.Generator().manual_seed(seed))
    seeds = torch.randint(2**62, (config.particles,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Particles([scene(config, torch.Generator().manual_seed(s)) for s in seeds])


def scene(config: Config, generator: torch.Generator) -> SceneStudent:
    """A new scene. A background that its prompt names is its usual one."""
    device, render, named = pick_device(config.device), config.render, named_background(config.prompt)
    usual = named or "white"
    if named:
        if render.background not in ("white", named):
            raise ValueError(f"the prompt names a {named} background and render.background is {render.background}")
        render = dataclasses.replace(render, background=named)
    settings = SceneConfig(config.field, config.occupancy, render, config.camera, config.regularise)

    def prompts(cameras: Cameras, background: str) -> list[str]:
        plain_name = background.isalpha() and background not in (usual, "learned")
        return [f"{config.prompt} on a {background} background" if plain_name else config.prompt] * len(cameras)

    backgrounds = {named: COLOURS[named]} if named else None
    return SceneStudent(settings, generator, prompts, backgrounds, ops.choose(device, config.backend), device)


def critic(config: RunConfig, teacher: Teacher) -> Learnt | None:
    """A critic that starts from the teacher, where the method needs one."""
    if "critic" not in config.method.NEEDS:
        return None
    return Learnt(teacher, config.critic, torch.Generator().manual_seed(config.seed))


def objective(config: RunConfig, teacher: Teacher, critic: Learnt | None = None) -> ScoreObjective:
    """The method, bound to its teacher and critic. Raises ValueError where it lacks what it needs."""
    if config.guidance.perp_neg and (teacher.views != "words" or isinstance(config, PaintConfig)):
        raise ValueError("guidance.perp_neg works through a scene's view words: set teacher.views=words, or leave it 0")
    return ScoreObjective(
        teacher,
        config.method,
        config.time,
        config.weight,
        config.negative,
        config.uncond_camera,
        config.noise,
        config.guidance,
        critic,
        config.source.prompt,
        config.seed,
    )
