"""Objects from a config: device, teacher, student, critic, objective."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sds3d import ops
from sds3d.cameras import Cameras
from sds3d.config.load import Config, DistillConfig, PaintConfig, RunConfig
from sds3d.data import digits
from sds3d.data.folder import read as read_folder
from sds3d.distill import pairs, perceptual
from sds3d.distill.adversarial.generator_loss import Adversarial
from sds3d.distill.core import ScoreMethod, ScoreObjective, scale_of
from sds3d.distill.critics import TrainedCritic
from sds3d.distill.discriminators import Real, TrainedDiscriminator
from sds3d.distill.regression import Regression
from sds3d.distill.score.bridge import Bridge
from sds3d.prompts import COLOURS, VIEW_WORDS, named_background, named_view, words
from sds3d.runs.folder import slug
from sds3d.runtime.device import pick_device
from sds3d.runtime.distributed import Processes
from sds3d.runtime.files import read_text, user_path
from sds3d.runtime.transfer import onto
from sds3d.students.base import Particles, Student
from sds3d.students.generator import FewStepGenerator, paint
from sds3d.students.image import ImageStudent
from sds3d.students.scene.student import BACKGROUNDS, SceneConfig, SceneStudent
from sds3d.teachers.base import Teacher
from sds3d.teachers.hf.teacher import DiffusersTeacher
from sds3d.teachers.load import load_teacher
from sds3d.teachers.training import sources
from sds3d.train import Objective


def usable_here(config: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """The config of a run that may have been made on another machine, with a device and kernels that are on this one.
    What it had and is not here is replaced, with a warning, unless the user gives it now.

    Args:
        given: what the user gives, by key.

    Raises:
        ValueError: the user gives a device that is not here.
    """
    try:
        device = pick_device(config.device)
    except ValueError:
        if "device" in given:
            raise
        device = pick_device("auto")
        warnings.warn(
            f"the run was made with device={config.device}, which is not here: it goes on with device={device}",
            stacklevel=4,  # past the decorator of launch.resume
        )
        config = dataclasses.replace(config, device=str(device))
    if isinstance(config, Config) and "backend" not in given:
        try:
            ops.choose(device, config.backend)
        except ValueError:
            found = ops.choose(device).name
            warnings.warn(
                f"the run was made with backend={config.backend}, which cannot run on {device} here: it goes on with "
                f"backend={found}",
                stacklevel=4,  # past the decorator of launch.resume
            )
            config = dataclasses.replace(config, backend="auto")
    return config


def teacher(config: RunConfig) -> Teacher:
    """The config's teacher, which must know its prompts. Raises ValueError."""
    if isinstance(config, Config):
        _refuse_view(config)
    found = load_teacher(config.teacher, config.device)
    require_views(config, found)
    require_ring(config, found)
    if isinstance(config, DistillConfig):
        if getattr(found, "views_per_set", 1) > 1:
            raise ValueError(f"the teacher {config.teacher.name} judges views of a scene, and a generator draws none")
        if isinstance(found, DiffusersTeacher):
            found.words.sided = False
        if "real" in config.method.NEEDS or ("pairs" in config.method.NEEDS and config.distance == "teacher"):
            _ = found.feature_width  # which not every network has
        if not config.prompt:
            return found
    for name, prompt in (
        ("", config.prompt),
        ("negative: ", config.negative),
        ("source.prompt: ", config.source.prompt),
        ("prompt and negative together: ", _spoilt(config)),
        *((f"on {name}: ", f"{config.prompt} on a {name} background") for name in _drawn_backgrounds(config)),
    ):
        if prompt or not name:
            try:
                found.check(prompt)
            except ValueError as error:
                raise ValueError(f"{name}{error}") from error
    return found


def _refuse_view(config: Config) -> None:
    """Raises ValueError where a scene's prompt names a view. Warns where view words may mean something else, which only
    a pipeline's text encoder can tell."""
    from sds3d.teachers.hf import loading

    if view := named_view(config.prompt):
        raise ValueError(f"the prompt says {view!r}, but a scene is seen from all sides; leave it out")
    said = [view for view in VIEW_WORDS if view in " ".join(words(config.prompt))]
    if said and loading.is_pipeline(config.teacher.name):
        warnings.warn(
            f"the prompt has the words {said[0]!r}, taken as part of the object; if they mean where it is seen from, "
            "leave them out: a scene is seen from all sides",
            stacklevel=3,
        )


def require_views(config: RunConfig, teacher: Teacher) -> None:
    """Raises ValueError where a teacher cannot know from where a scene is seen."""
    known = getattr(teacher, "vocabulary", None)
    blind = teacher.views == "words" and known is not None and not {"front", "back", "view"} <= set(known)
    if isinstance(config, Config) and blind:
        raise ValueError(
            f"the teacher {config.teacher.name} knows neither cameras nor view words, which a scene needs; it can "
            "paint (sds3d paint) and teach a generator (sds3d distill)"
        )


def require_ring(config: RunConfig, teacher: Teacher) -> None:
    """Raises ValueError where a teacher judges several views of a scene at once, and the scene's do not stand so."""
    views_per_set = getattr(teacher, "views_per_set", 1)
    if isinstance(config, Config) and teacher.views == "camera" and config.camera.ring % views_per_set:
        raise ValueError(
            f"the teacher {config.teacher.name} judges {views_per_set} views of a scene at once: give "
            f"camera.ring={views_per_set} and render.views={views_per_set}, or a multiple"
        )


def _spoilt(config: RunConfig) -> str:
    """The prompt with the words of its defects, where the method asks for that."""
    return f"{config.prompt}, {config.negative}" if isinstance(config.method, Bridge) and config.negative else ""


def _drawn_backgrounds(config: RunConfig) -> list[str]:
    """The backgrounds that a scene's prompts will name, beside its usual one."""
    drawn = isinstance(config, Config) and config.render.background == "random"
    return list(BACKGROUNDS)[1:] if drawn and not named_background(config.prompt) else []


def student(config: RunConfig, teacher: Teacher | None = None, processes: Processes = Processes()) -> Student:
    """What a run trains, new; the same seed gives the same one. A generator starts from its teacher.

    Raises:
        ValueError: a picture to begin from that cannot be read, a background that is not known.
    """
    seed = 2 * config.seed + 1  # the loop's own stream is 2 * seed
    if isinstance(config, PaintConfig):
        rng = torch.Generator().manual_seed(seed)
        return ImageStudent(config.image, config.prompt, rng, pick_device(config.device))
    if isinstance(config, DistillConfig):
        assert teacher is not None, "a generator starts from its teacher"
        return FewStepGenerator(
            teacher, config.generator, prompts(config, teacher), identity(config, teacher), processes
        )
    assert isinstance(config, Config), config
    if config.particles == 1:
        return scene(config, torch.Generator().manual_seed(seed))
    seeds = torch.randint(2**62, (config.particles,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Particles([scene(config, torch.Generator().manual_seed(s)) for s in seeds])


def scene(config: Config, rng: torch.Generator) -> SceneStudent:
    """A new scene. A background that its prompt names is its usual one."""
    device, render, named = pick_device(config.device), config.render, named_background(config.prompt)
    usual = named or "white"
    if named:
        if render.background not in ("white", "learned", named):
            raise ValueError(f"the prompt names a {named} background and render.background is {render.background}")
        render = dataclasses.replace(render, background=named)
    settings = SceneConfig(config.field, config.occupancy, render, config.camera, config.regularise)

    def prompts(cameras: Cameras, background: str) -> list[str]:
        plain_name = background.isalpha() and background not in (usual, "learned")
        return [f"{config.prompt} on a {background} background" if plain_name else config.prompt] * len(cameras)

    backgrounds = {named: COLOURS[named]} if named else None
    return SceneStudent(settings, rng, prompts, backgrounds, ops.choose(device, config.backend), device)


def prompts(config: DistillConfig, teacher: Teacher) -> list[str]:
    """What a generator learns to draw. Raises ValueError for a file that cannot be read or a word nobody knows."""
    if config.prompt and config.generator.prompts:
        raise ValueError("give either prompt or generator.prompts, not both")
    if config.prompt:
        return [config.prompt]
    if not config.generator.prompts:
        toys = config.teacher.name in ("small", "toybox")  # whose weights are older than the list in their header
        if not (toys or teacher.prompts):
            raise ValueError(
                f"the teacher {config.teacher.name} does not say what it was trained on; say what to draw: "
                "--prompts FILE (generator.prompts=FILE), with a prompt a line, or --prompt"
            )
        return list(sources.Toybox().prompts if toys else teacher.prompts)
    try:
        text = read_text(user_path(config.generator.prompts))
    except ValueError as error:
        raise ValueError(f"generator.prompts: {error}; give a text file, one prompt a line") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        teacher.check(line)
    return lines


def identity(config: RunConfig, teacher: Teacher) -> str:
    """A teacher's name and what its weights are, as in "digits 0123456789ab"."""
    return f"{Path(config.teacher.name).name} {teacher.fingerprint}"


def critic(config: RunConfig, teacher: Teacher, processes: Processes = Processes()) -> TrainedCritic | None:
    """A critic that starts from the teacher, where the method needs one; a discriminator in it, where it needs that.

    Raises:
        ValueError: the method is not for this kind of run, or there are no real images for a discriminator.
    """
    require_kind(config)
    if "critic" not in config.method.NEEDS:
        return None
    rng = torch.Generator().manual_seed(config.seed)
    if "real" not in config.method.NEEDS:
        return TrainedCritic(teacher, config.critic, rng, processes)
    assert isinstance(config, DistillConfig), config
    return TrainedDiscriminator(
        teacher, config.critic, rng, real(config, teacher, processes), config.method.discriminator, processes
    )


def require_kind(config: RunConfig) -> None:
    """Raises ValueError where the method trains generators only, and the run is none of a generator."""
    for need in set(config.method.NEEDS) & {"pairs", "real"}:
        if not isinstance(config, DistillConfig):
            raise ValueError(f"{type(config.method).__name__} needs {need}: it trains generators, with sds3d distill")


def real(config: DistillConfig, teacher: Teacher, processes: Processes = Processes()) -> Real:
    """What draws real images for a discriminator, told as the generator is told: by its own prompts.

    Raises:
        ValueError: there are none, or none that is captioned with one of the prompts.
    """
    name = config.real or config.teacher.name
    if name in ("toybox", "small") or not (config.real or name == "digits"):
        raise ValueError(f"{type(config.method).__name__} wants real images; give real=FOLDER, with captions")
    found = digits.pictures() if name == "digits" else read_folder(name, teacher.image_size, 1000).pictures
    wanted = set(prompts(config, teacher))
    told = [next((text for text in texts if text in wanted), "") for texts in found.captions]
    kept = [i for i, text in enumerate(told) if text]
    if not kept:
        raise ValueError(f"no real image is captioned {sorted(wanted)[0]!r}, or any of the generator's prompts")
    device, parts = pick_device(config.device), [kept[i : i + 64] for i in range(0, len(kept), 64)]
    with torch.no_grad():
        x = torch.cat([teacher.encode(onto(found[part].rgb(), device)) for part in parts])

    def draw(count: int, rng: torch.Generator) -> tuple[Tensor, list[str]]:
        index = processes.randint(len(kept), count, rng)
        return x[onto(index, x.device)], [told[kept[i]] for i in index.tolist()]

    return draw


def objectives(
    score: ScoreObjective | None, config: RunConfig, student: Student, processes: Processes = Processes()
) -> dict[str, Objective]:
    """The method's objectives by name: its score, where it has one, a regression, a discriminator's verdict."""
    found: dict[str, Objective] = {} if score is None else {score.name: score}
    if "pairs" in config.method.NEEDS:
        assert isinstance(student, FewStepGenerator), student
        teacher = student.teacher
        made = pairs.load(pairs_folder(config, teacher), config.pairs, pick_device(config.device))

        def draw(noise: Tensor, prompts: list[str]) -> Tensor:
            return paint(teacher, student.network, student.times[:1], [noise], prompts, student.size)

        apart = perceptual.distance(config.distance, teacher, pick_device(config.device))
        found["regression"] = Regression(made, draw, apart, config.method.regression, config.pairs.batch, processes)
    if "real" in config.method.NEEDS:
        assert score is not None and isinstance(score.critic, TrainedDiscriminator), score
        found["adversarial"] = Adversarial(score.critic, config.method.adversarial)
    return found


def pairs_folder(config: DistillConfig, teacher: Teacher) -> Path:
    """Where a run's pairs are."""
    if config.pairs.folder:
        return Path(config.pairs.folder).expanduser()
    told = (config.pairs.sampler, config.pairs.steps, scale_of(config.method.scale, 0), prompts(config, teacher))
    told += (str(teacher.dtype),)
    mark = hashlib.sha256(repr(told).encode()).hexdigest()[:8]  # one folder for each that would differ
    return Path(config.out).expanduser() / "pairs" / f"{slug(identity(config, teacher))}-{mark}"


def make_pairs(config: DistillConfig, teacher: Teacher) -> Iterator[int]:
    """Make the pairs a run needs and does not have; yields how many are there. Raises ValueError."""
    scale, device = scale_of(config.method.scale, 0), pick_device(config.device)
    told, folder = prompts(config, teacher), pairs_folder(config, teacher)
    return pairs.make(teacher, identity(config, teacher), config.pairs, told, folder, scale, device)


def objective(config: RunConfig, teacher: Teacher, critic: TrainedCritic | None = None) -> ScoreObjective | None:
    """A score method, bound to its teacher and critic; None for a method of another family. Raises ValueError where it
    lacks what it needs."""
    if not isinstance(config.method, ScoreMethod):
        return None
    if config.guidance.perp_neg and (teacher.views != "words" or not isinstance(config, Config)):
        raise ValueError("guidance.perp_neg works through a scene's view words: set teacher.views=words, or leave it 0")
    return ScoreObjective(
        teacher,
        config.method,
        config.time,
        weight=config.weight,
        negative=config.negative,
        uncond_camera=config.uncond_camera,
        noise=config.noise,
        guidance=config.guidance,
        critic=critic,
        source_prompt=config.source.prompt,
        noise_seed=config.seed,
    )
