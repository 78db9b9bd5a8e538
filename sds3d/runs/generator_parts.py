"""What a run that trains a generator is built of, where it differs from other runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sds3d.config.load import name_of
from sds3d.config.schema import DistillConfig
from sds3d.data import digits
from sds3d.data.folder import read as read_folder
from sds3d.distill import pairs, perceptual
from sds3d.distill.adversarial.generator_loss import Adversarial
from sds3d.distill.core import ScoreObjective, scale_of
from sds3d.distill.critics import TrainedCritic
from sds3d.distill.discriminators import RealSampler, TrainedDiscriminator
from sds3d.distill.regression import Regression
from sds3d.runs.folder import slug
from sds3d.runs.memory_savings import Saving, halved, of_critic
from sds3d.runtime.device import pick_device
from sds3d.runtime.distributed import Processes
from sds3d.runtime.files import read_text, user_path
from sds3d.runtime.transfer import onto
from sds3d.students.base import Student
from sds3d.students.generator import FewStepGenerator, paint
from sds3d.teachers.base import views_per_set
from sds3d.teachers.hf.teacher import DiffusersTeacher
from sds3d.teachers.load import Loaded
from sds3d.teachers.training import sources
from sds3d.train import Objective


def title(config: DistillConfig) -> str:
    """What the run folder is named after."""
    return f"{Path(config.teacher.name).stem} {name_of(config.method)} {config.prompt}"


def check_teacher(config: DistillConfig, teacher: Loaded) -> None:
    """Raises ValueError where a teacher cannot teach a generator. A pipeline's prompts get no view words."""
    if views_per_set(teacher) > 1:
        raise ValueError(f"the teacher {config.teacher.name} judges views of a scene, and a generator draws none")
    if isinstance(teacher, DiffusersTeacher):
        teacher.embedder.all_views = False
    if "real" in config.method.NEEDS or ("pairs" in config.method.NEEDS and config.distance == "teacher"):
        _ = teacher.feature_width  # which not every network has


def identity(config: DistillConfig, teacher: Loaded) -> str:
    """A teacher's name and what its weights are, as in "digits 0123456789ab"."""
    return f"{Path(config.teacher.name).name} {teacher.fingerprint}"


def build_student(config: DistillConfig, teacher: Loaded | None, processes: Processes) -> FewStepGenerator:
    """A generator that starts from its teacher."""
    assert teacher is not None, "a generator starts from its teacher"
    return FewStepGenerator(teacher, config.generator, prompts(config, teacher), identity(config, teacher), processes)


def prompts(config: DistillConfig, teacher: Loaded) -> list[str]:
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


def build_critic(config: DistillConfig, teacher: Loaded, rng: torch.Generator, processes: Processes) -> TrainedCritic:
    """A critic that starts from the teacher, with a discriminator in it where the method needs one.

    Raises:
        ValueError: there are no real images for a discriminator.
    """
    if "real" not in config.method.NEEDS:
        return TrainedCritic(teacher, config.critic, rng, processes)
    found = real(config, teacher, processes)
    return TrainedDiscriminator(teacher, config.critic, rng, found, config.method.discriminator, processes)


def real(config: DistillConfig, teacher: Loaded, processes: Processes = Processes()) -> RealSampler:
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


def further_objectives(
    score: ScoreObjective | None, config: DistillConfig, student: Student, processes: Processes
) -> dict[str, Objective]:
    """What a method has beside its score: a regression on pairs, a discriminator's verdict."""
    found: dict[str, Objective] = {}
    if "pairs" in config.method.NEEDS:
        assert isinstance(student, FewStepGenerator), student
        teacher: Any = student.teacher  # one of those that are loaded
        made = pairs.load(pairs_folder(config, teacher), config.pairs, pick_device(config.device))

        def draw(noise: Tensor, prompts: list[str]) -> Tensor:
            return paint(teacher, student.network, student.times[:1], [noise], prompts, student.size)

        apart = perceptual.distance(config.distance, teacher, pick_device(config.device))
        found["regression"] = Regression(made, draw, apart, config.method.regression, config.pairs.batch, processes)
    if "real" in config.method.NEEDS:
        assert score is not None and isinstance(score.critic, TrainedDiscriminator), score
        found["adversarial"] = Adversarial(score.critic, config.method.adversarial)
    return found


def pairs_folder(config: DistillConfig, teacher: Loaded) -> Path:
    """Where a run's pairs are."""
    if config.pairs.folder:
        return Path(config.pairs.folder).expanduser()
    told = (config.pairs.sampler, config.pairs.steps, scale_of(config.method.scale, 0), prompts(config, teacher))
    told += (str(teacher.dtype),)
    mark = hashlib.sha256(repr(told).encode()).hexdigest()[:8]  # one folder for each that would differ
    return Path(config.out).expanduser() / "pairs" / f"{slug(identity(config, teacher))}-{mark}"


def make_pairs(config: DistillConfig, teacher: Loaded) -> Iterator[int]:
    """Make the pairs a run needs and does not have; yields how many are there. Raises ValueError."""
    scale, device = scale_of(config.method.scale, 0), pick_device(config.device)
    told, folder = prompts(config, teacher), pairs_folder(config, teacher)
    return pairs.make(teacher, identity(config, teacher), config.pairs, told, folder, scale, device)


def savings(config: DistillConfig, image_size: int) -> list[Saving]:
    """What can be set to save memory, in the usual order of effect; see `Kind.savings`."""
    found = halved("pairs.batch", config.pairs.batch) if "pairs" in config.method.NEEDS else []
    return [*of_critic(config), *halved("generator.batch", config.generator.batch), *found]


def usual_savings(config: DistillConfig) -> tuple[list[str], str]:
    """Of a packaged teacher's run that is out of memory: what it can take up where it stopped, and all in words."""
    return [], "lower generator.batch, pairs.batch"
