"""The parts of a run that are particular to few-step generators."""

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
    """Return the text that the run folder is named after."""
    return f"{config.teacher.short_name} {name_of(config.method)} {config.prompt}"


def check_teacher(config: DistillConfig, teacher: Loaded) -> None:
    """Raise ValueError if a teacher cannot teach a generator. Turns off the view words of a diffusers pipeline."""
    if views_per_set(teacher) > 1:
        name = config.teacher.name
        raise ValueError(f"the teacher {name} judges several views of a scene at once; a generator draws single images")
    if isinstance(teacher, DiffusersTeacher):
        teacher.embedder.all_views = False
    if "real" in config.method.NEEDS or ("pairs" in config.method.NEEDS and config.distance == "teacher"):
        _ = teacher.feature_width  # raises where the network has no features


def identity(config: DistillConfig, teacher: Loaded) -> str:
    """Return a teacher's name and the fingerprint of its weights, as in "digits 0123456789ab"."""
    return f"{Path(config.teacher.name).name} {teacher.fingerprint}"


def build_student(config: DistillConfig, teacher: Loaded | None, processes: Processes) -> FewStepGenerator:
    """Build a generator that starts from its teacher."""
    assert teacher is not None, "a generator starts from its teacher"
    return FewStepGenerator(teacher, config.generator, prompts(config, teacher), identity(config, teacher), processes)


def prompts(config: DistillConfig, teacher: Loaded) -> list[str]:
    """Return the prompts that a generator learns to draw.

    Raises:
        ValueError: a file cannot be read, the teacher does not know a word, or it lists no prompts of its own.
    """
    if config.prompt and config.generator.prompts:
        raise ValueError("give either prompt or generator.prompts, not both")
    if config.prompt:
        return [config.prompt]
    if not config.generator.prompts:
        toys = config.teacher.name in ("small", "toybox")  # their headers, which are older, list no prompts
        if not (toys or teacher.prompts):
            raise ValueError(
                f"the teacher {config.teacher.name} does not say what it was trained on; say what to draw: "
                "--prompts FILE (generator.prompts=FILE), with one prompt per line, or --prompt"
            )
        return list(sources.Toybox().prompts if toys else teacher.prompts)
    try:
        text = read_text(user_path(config.generator.prompts))
    except ValueError as error:
        raise ValueError(f"generator.prompts: {error}; give a text file, one prompt per line") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        teacher.check(line)
    return lines


def build_critic(config: DistillConfig, teacher: Loaded, rng: torch.Generator, processes: Processes) -> TrainedCritic:
    """Build a critic that starts from the teacher, with a discriminator where the method needs one.

    Raises:
        ValueError: there are no real images for a discriminator.
    """
    if "real" not in config.method.NEEDS:
        return TrainedCritic(teacher, config.critic, rng, processes)
    draw = real(config, teacher, processes)
    return TrainedDiscriminator(teacher, config.critic, rng, draw, config.method.discriminator, processes)


def real(config: DistillConfig, teacher: Loaded, processes: Processes = Processes()) -> RealSampler:
    """Return a function that draws real images for a discriminator, with the generator's own prompts.

    The generator's prompts stand in for the images' captions, so that the discriminator cannot tell real images by
    their captions.

    Raises:
        ValueError: there are no real images, or none whose captions contain one of the prompts.
    """
    name = config.real or config.teacher.name
    if name in ("toybox", "small") or not (config.real or name == "digits"):
        raise ValueError(f"{type(config.method).__name__} needs real images; give real=FOLDER, with captions")
    pictures = digits.pictures() if name == "digits" else read_folder(name, teacher.image_size, 1000).pictures
    known = set(prompts(config, teacher))
    labels = [next((text for text in texts if text in known), "") for texts in pictures.captions]
    labelled = [i for i, label in enumerate(labels) if label]
    if not labelled:
        raise ValueError(f"no real image is captioned {sorted(known)[0]!r}, or any of the generator's prompts")
    device, batches = pick_device(config.device), [labelled[i : i + 64] for i in range(0, len(labelled), 64)]
    with torch.no_grad():
        x = torch.cat([teacher.encode(onto(pictures[batch].rgb(), device)) for batch in batches])

    def draw(count: int, rng: torch.Generator) -> tuple[Tensor, list[str]]:
        index = processes.randint(len(labelled), count, rng)
        return x[onto(index, x.device)], [labels[labelled[i]] for i in index.tolist()]

    return draw


def further_objectives(
    score: ScoreObjective | None, config: DistillConfig, student: Student, processes: Processes
) -> dict[str, Objective]:
    """Build the objectives beside the score: a regression on pairs, an adversarial loss, where the method has them."""
    objectives: dict[str, Objective] = {}
    if "pairs" in config.method.NEEDS:
        assert isinstance(student, FewStepGenerator), student
        teacher: Any = student.teacher  # one of the classes in `Loaded`
        loaded = pairs.load(pairs_folder(config, teacher), config.pairs, pick_device(config.device))

        def draw(noise: Tensor, prompts: list[str]) -> Tensor:
            return paint(teacher, student.network, student.times[:1], [noise], prompts, student.size)

        distance = perceptual.distance(config.distance, teacher, pick_device(config.device))
        weight, batch = config.method.regression, config.pairs.batch
        objectives["regression"] = Regression(loaded, draw, distance, weight, batch, processes)
    if "real" in config.method.NEEDS:
        assert score is not None and isinstance(score.critic, TrainedDiscriminator), score
        objectives["adversarial"] = Adversarial(score.critic, config.method.adversarial)
    return objectives


def pairs_folder(config: DistillConfig, teacher: Loaded) -> Path:
    """Return the folder of a run's pairs; its default name has a digest of everything that the pairs depend on."""
    if config.pairs.folder:
        return Path(config.pairs.folder).expanduser()
    settings = (config.pairs.sampler, config.pairs.steps, scale_of(config.method.scale, 0), prompts(config, teacher))
    settings += (str(teacher.dtype),)
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
    return Path(config.out).expanduser() / "pairs" / f"{slug(identity(config, teacher))}-{digest}"


def make_pairs(config: DistillConfig, teacher: Loaded) -> Iterator[int]:
    """Make the pairs that a run needs and does not have yet.

    Yields:
        The number of pairs made so far.

    Raises:
        ValueError: see `sds3d.distill.pairs.make`.
    """
    scale, device = scale_of(config.method.scale, 0), pick_device(config.device)
    folder = pairs_folder(config, teacher)
    return pairs.make(teacher, identity(config, teacher), config.pairs, prompts(config, teacher), folder, scale, device)


def savings(config: DistillConfig, image_size: int) -> list[Saving]:
    """Return settings that save memory, usually the most effective first; see `Kind.savings`."""
    fewer_pairs = halved("pairs.batch", config.pairs.batch) if "pairs" in config.method.NEEDS else []
    return [*of_critic(config), *halved("generator.batch", config.generator.batch), *fewer_pairs]


def usual_savings(config: DistillConfig) -> tuple[list[str], str]:
    """Return the advice for a packaged teacher that runs out of memory; see `Kind.usual_savings`."""
    return [], "lower generator.batch, pairs.batch"
