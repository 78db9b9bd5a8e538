"""Evaluation of generators, and of teachers with a sampler, on digits or toys, against held-out real images.

Every figure is measured with several seeds and reported as their mean and spread. The spread is the standard deviation
over the seeds against the same real images; it does not include the choice of the real images.

- FD-feat: Frechet distance between features of a classifier of real images. It is not FID, which has other features.
- KID-feat: unbiased kernel distance of the same features, not multiplied by 1,000.
- precision, recall: of the same features.
- copy rate: fraction of images that are nearer to a training image, in pixels, than 99 of 100 held-out images are
  (digits only: the toybox never shows an image twice).

FD-feat, FID, precision and recall depend on the number of images, and are left out if there are fewer than held-out
ones. KID-feat does not, but for few images it is uncertain and may be negative.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sds3d.config.load import of_run
from sds3d.config.typed import plain
from sds3d.data import digits, renders, toybox
from sds3d.distill.core import scale_of
from sds3d.evaluate import features
from sds3d.evaluate.classifiers import DigitJudge, ToyJudge
from sds3d.evaluate.inception import Inception
from sds3d.media import sheet
from sds3d.runs import generator_parts, kinds
from sds3d.runs.folder import Run
from sds3d.runs.generator import CARD, LoadedGenerator, a_few, find, load_generator, rows_of, write_card
from sds3d.runtime.files import replacing
from sds3d.runtime.machine import machine
from sds3d.teachers.base import Teacher
from sds3d.teachers.drawing import sample
from sds3d.teachers.load import load_teacher

FIGURES = ("fd_feat", "kid_feat", "class_accuracy", "precision", "recall", "copy_rate", "samples_per_second")
FEWEST = 600  # least number of true renders that toys are compared with, about the number of held-out digits
BEST = ("heun", 18)  # the best sampler for the packaged teachers, and its steps
Draw = Callable[[list[str], int], Tensor]  # prompts, seed -> images (B, 3, H, W) in [0, 1]


@dataclass(frozen=True)
class Measured:
    """Mean and standard deviation of a figure over several seeds."""

    mean: float
    spread: float

    def __str__(self) -> str:
        places = 0 if abs(self.mean) >= 100 else 3
        return f"{self.mean:.{places}f} ± {self.spread:.{places}f}"

    @staticmethod
    def of(values: list[float]) -> Measured:
        """Compute mean and standard deviation; the spread of one value is 0."""
        rows = torch.tensor(values, dtype=torch.float64)
        return Measured(float(rows.mean()), float(rows.std()) if len(values) > 1 else 0.0)


class Real(Protocol):
    """Real images that drawn images are compared with.

    Attributes:
        held_out: (N, 3, H, W) in [0, 1].
        prompts: the prompts of the real images.
    """

    prompts: tuple[str, ...]

    @property
    def held_out(self) -> Tensor:
        """Images that no teacher was trained on."""
        ...

    def labels(self, number: int) -> Tensor:
        """Return the classes of ``number`` images, which take the prompts in turn, (number, ...)."""
        ...

    def figures(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute the figures of images (B, 3, H, W) in [0, 1] whose classes should be ``labels``."""
        ...


class Digits:
    """Real digits that drawn digits are compared with.

    Args:
        device: the device on which features are computed.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.judge, self.prompts = DigitJudge(device), tuple(map(digits.prompt, range(10)))
        self.train, self.held_out = (digits.pictures(part).rgb() for part in digits.PARTS)

    @cached_property
    def real(self) -> Tensor:
        """Features of the held-out images, (N, D)."""
        return self.judge.features(self.held_out).cpu()

    def labels(self, number: int) -> Tensor:
        """Return the digits 0 to 9 in turn, (number,)."""
        return torch.arange(number) % 10

    def figures(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute FIGURES, without the speed, of images (B, 3, 8, 8) of the digits (B,); see ``_distances``."""
        drawn, train, held_out = (x.mean(1).flatten(1) for x in (images.cpu(), self.train, self.held_out))
        return {
            **_distances(self.judge.features(images).cpu(), self.real),
            "class_accuracy": float((self.judge.classify(images).cpu() == labels).double().mean()),
            "copy_rate": features.copy_rate(drawn, train, held_out),
        }

    def floor(self) -> dict[str, float]:
        """Compute the figures of the training images, which a perfect copy of the data would reach."""
        index = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))
        return self.figures(self.train[index], digits.labels()[index])


class Toys:
    """True renders of the toybox that drawn toys are compared with, from cameras as in the teachers' training.

    Args:
        prompts: the prompts of the renders. Whatever a prompt does not mention has its default value.
        number: number of renders; they take the prompts in turn.
        device: the device on which features are computed.

    Raises:
        ValueError: the toybox cannot draw a prompt.
    """

    def __init__(self, prompts: Sequence[str], number: int = 2000, device: torch.device | str = "cpu"):
        self.judge, self.prompts, self.number = ToyJudge(device), tuple(prompts), number
        self.toys = [toybox.parse(prompt) for prompt in prompts]

    @property
    def held_out(self) -> Tensor:
        """The renders, (number, 3, 64, 64)."""
        return self._held_out

    @cached_property
    def _held_out(self) -> Tensor:
        return self.renders(0)

    @cached_property
    def real(self) -> Tensor:
        """Features of the renders, (number, D)."""
        return self.judge.features(self.held_out).cpu()

    def renders(self, seed: int) -> Tensor:
        """Render the toys from random cameras, (number, 3, 64, 64)."""
        rng, count = torch.Generator().manual_seed(seed), len(self.toys)
        images = torch.empty(self.number, 3, self.judge.size, self.judge.size)
        for i, toy in enumerate(self.toys[: self.number]):
            index = torch.arange(i, self.number, count)
            images[index] = toy.render(renders.draw_cameras(len(index), rng))[0]
        return images

    def labels(self, number: int) -> Tensor:
        """Return the indices of kind, main and second colour, (number, 3); -1 if a toy has no second colour."""
        kinds, colours = self.judge.kinds, self.judge.colours
        rows = [
            (kinds.index(t.name), colours.index(t.main), colours.index(t.second) if t.kind.second else -1)
            for t in self.toys
        ]
        return torch.tensor(rows)[torch.arange(number) % len(rows)]

    def figures(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute FIGURES, without speed and copies, of images (B, 3, 64, 64); see ``_distances``."""
        drawn, predicted = self.judge.features(images).cpu(), self.judge.classify(images).cpu()
        correct = ((predicted == labels) | (labels < 0)).all(1)
        return {
            **_distances(drawn, self.real),
            "class_accuracy": float(correct.double().mean()),
        }

    def floor(self) -> dict[str, float]:
        """Compute the figures of other true renders."""
        return self.figures(self.renders(1), self.labels(self.number))


def _distances(drawn: Tensor, real: Tensor) -> dict[str, float]:
    """Distances of features (B, D) from real ones (N, D); if B is below N, only the kernel distance."""
    kernel = {"kid_feat": features.kernel_distance(drawn, real)}
    if len(drawn) < len(real):
        return kernel
    index = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(0))[: len(real)]  # N of B
    precision, recall = features.precision_recall(drawn[index], real)
    return {"fd_feat": features.frechet(drawn, real), **kernel, "precision": precision, "recall": recall}


def real_for(prompts: Sequence[str], number: int, size: int | None = None) -> Real:
    """Return the real images with which a generator is compared.

    Args:
        prompts: the generator's prompts.
        number: number of images that it will draw.
        size: width and height of its images in pixels; None is not checked.

    Raises:
        ValueError: the prompts are neither all ten digits nor toys, or the classifiers need another image size.
    """
    real: Digits | Toys = Digits()
    try:
        if not set(real.prompts) <= set(prompts):
            real = Toys(prompts, min(max(number, FEWEST), 2000))
        if size not in (None, real.judge.size):
            raise ValueError(f"its images are of {size} pixels a side, and the judge looks at {real.judge.size}")
    except ValueError as error:
        raise ValueError(f"only generators of all ten digits, or of toys, can be judged so far: {error}") from error
    return real


def measure(
    draw: Draw, number: int = 5000, seeds: int = 3, real: Real | None = None, inception: Inception | None = None
) -> Iterator[dict[str, float]]:
    """Measure the figures of drawn images.

    Args:
        draw: (prompts, seed) -> images.
        number: number of images for each seed.
        real: the real images; the digits by default.
        inception: if given, FID is measured, too.

    Yields:
        The figures of each seed.

    Raises:
        ValueError: ``number`` is below 2; or ``inception`` is given and there are fewer images than held-out ones.
    """
    real = real or Digits()
    least = len(real.held_out)
    if number < 2:
        raise ValueError(f"{number} images are too few; give at least 2, and {least} for FD-feat")
    if number < least and inception is not None:
        raise ValueError(f"{number} images are too few for FID; give at least {least}, as many as are held out")
    if number < least:
        warnings.warn(
            f"{number} images are too few for FD-feat, precision and recall, which are left out: give at least {least}",
            stacklevel=2,
        )
    prompts, labels = [real.prompts[i % len(real.prompts)] for i in range(number)], real.labels(number)
    for seed in range(seeds):
        begun = time.perf_counter()
        images = draw(prompts, seed)
        seconds = time.perf_counter() - begun
        fid = {} if inception is None else {"fid": inception.distance(images, real.held_out)}
        yield {**real.figures(images, labels), **fid, "samples_per_second": number / seconds}


def summary(rows: list[dict[str, float]]) -> dict[str, Measured]:
    """Return mean and spread of every figure over the rows."""
    return {name: Measured.of([row[name] for row in rows]) for name in rows[0]}


def by_teacher(teacher: Teacher, sampler: str, steps: int, guidance: float = 1.0) -> Draw:
    """Return a function that draws with a teacher and a sampler."""
    return lambda prompts, seed: sample(teacher, prompts, seed, guidance, None, steps, sampler).cpu()


def by_generator(generator: LoadedGenerator) -> Draw:
    """Return a function that draws with a generator."""
    return generator


def table(rows: dict[str, dict[str, Measured]]) -> str:
    """Format named rows of figures as a Markdown table."""
    names = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for label, row in rows.items():
        lines.append(f"| {label} | " + " | ".join(str(row[name]) for name in names) + " |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """The evaluation of a generator.

    Args:
        figures: FIGURES and "fd_ratio", the generator's FD-feat over its teacher's, if there are enough images for it.
        rows: "generator" and "teacher" -> figures.
        files: paths of the files that were written.
    """

    figures: dict[str, Measured]
    rows: dict[str, dict[str, Measured]]
    files: list[str]


def judge_generator(
    path: Path,
    number: int = 5000,
    seeds: int = 3,
    note: Callable[[str, int, dict[str, float]], None] = lambda name, seed, row: None,
    fid: bool = False,
    dtype: str | None = None,
) -> Report:
    """Measure a generator of digits or toys and its teacher. Writes eval.json, eval.png and the card beside it.

    Args:
        path: the generator's run folder.
        number: number of images for each seed.
        seeds: number of seeds.
        note: called after each seed with "generator" or "teacher", the seed, and the figures.
        fid: measure FID, too; see `sds3d.evaluate.inception`.
        dtype: the dtype that both compute in; None is the run's teacher.dtype.

    Raises:
        ValueError: it draws neither digits nor toys, its teacher is missing or has changed, or FID is not available.
    """
    file = find(path)
    assert file is not None, path
    config = of_run(file.parent / "config.yaml")
    settings = config.teacher if dtype is None else replace(config.teacher, dtype=dtype)
    painter = load_generator(file, dtype=settings.dtype)
    real = real_for(painter.prompts, number, painter.image_size)
    teacher = load_teacher(settings)
    identity = generator_parts.identity(config, teacher)
    if identity != painter.header["teacher"]:
        raise ValueError(f"{path} was distilled from {painter.header['teacher']}; this is {identity}")
    inception, by_name = Inception(painter.device) if fid else None, {}
    guided = by_teacher(teacher, *BEST, scale_of(config.method.scale, 0))
    draws = {"generator": by_generator(painter), "teacher": guided}
    for name, draw in draws.items():
        rows = []
        for row in measure(draw, number, seeds, real, inception):
            note(name, len(rows), row)
            rows.append(row)
        by_name[name] = rows
    for ours, theirs in zip(by_name["generator"], by_name["teacher"]):
        if "fd_feat" in ours:
            ours["fd_ratio"], theirs["fd_ratio"] = ours["fd_feat"] / theirs["fd_feat"], 1.0
    rows = {name: summary(values) for name, values in by_name.items()}
    report = {**plain(rows["generator"]), "teacher": plain(rows["teacher"]), "images": number, "seeds": seeds}
    command = f"sds3d eval {path} -n {number} --seeds {seeds}" + " --fid" * fid
    command += f" --dtype {dtype}" * (dtype is not None)
    report |= {"machine": machine(painter.device), "command": command}
    report["dtype"] = str(painter.dtype).removeprefix("torch.")
    with replacing(file.parent / "eval.json") as part:
        part.write_text(json.dumps(report, indent=1), encoding="utf-8")
    prompts = a_few(painter.prompts)
    images = painter(prompts * 16, seed=1)
    grid = sheet.contact_sheet(rows_of(images, len(prompts)), file.parent / "eval.png", prompts, sheet.seen(images))
    write_card(file.parent, config, painter.header["teacher"], table(rows))
    kinds.write_page(Run(file.parent))
    return Report(rows["generator"], rows, [str(file.parent / "eval.json"), str(grid), str(file.parent / CARD)])
