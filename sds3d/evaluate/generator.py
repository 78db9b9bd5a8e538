"""How well a generator, or a teacher with a sampler, draws digits or toys: against real ones that neither ever saw.

Every figure is measured with several seeds, and reported as their mean and spread (standard deviation over the seeds,
against the same real images: it says nothing of how those were chosen). FD-feat is the Frechet distance between the
features of a classifier of real images (it is no FID: other features); KID-feat is the unbiased kernel distance of the
same features, as it is and not times 1,000; precision and recall are of them, too; a copy is an image nearer to a
training image, in pixels, than 99 of 100 held-out ones are (of digits only: the toybox never shows an image twice).

Fewer images than are held out have no FD-feat, FID, precision and recall, which depend on how many there are. KID-feat
does not, but of few images it is uncertain, and may be below 0.
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
from sds3d.evaluate.inception import Inception
from sds3d.evaluate.judge import DigitJudge, ToyJudge
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
FEWEST = 600  # renders of toys that a generator of toys is compared with, about as many as there are digits
BEST = ("heun", 18)  # the packaged teachers' best sampler and its steps
Draw = Callable[[list[str], int], Tensor]  # prompts, seed -> images (B, 3, H, W) in [0, 1]


@dataclass(frozen=True)
class Measured:
    """A figure over several seeds."""

    mean: float
    spread: float

    def __str__(self) -> str:
        places = 0 if abs(self.mean) >= 100 else 3
        return f"{self.mean:.{places}f} ± {self.spread:.{places}f}"

    @staticmethod
    def of(values: list[float]) -> Measured:
        """Mean and standard deviation; the spread of one value is 0."""
        rows = torch.tensor(values, dtype=torch.float64)
        return Measured(float(rows.mean()), float(rows.std()) if len(values) > 1 else 0.0)


class Real(Protocol):
    """Real images, and what they say of drawn ones.

    Attributes:
        held_out: (N, 3, H, W) in [0, 1].
        prompts: what they show.
    """

    prompts: tuple[str, ...]

    @property
    def held_out(self) -> Tensor:
        """Images that nobody trained on."""
        ...

    def wanted(self, number: int) -> Tensor:
        """What ``number`` images of the prompts, each in its turn, should show, (number, ...)."""
        ...

    def figures(self, images: Tensor, wanted: Tensor) -> dict[str, float]:
        """What images (B, 3, H, W) in [0, 1] are worth."""
        ...


class Digits:
    """Real digits, and what they say of drawn ones.

    Args:
        device: where features are computed.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.judge, self.prompts = DigitJudge(device), tuple(map(digits.prompt, range(10)))
        self.train, self.held_out = (digits.pictures(part).rgb() for part in digits.PARTS)

    @cached_property
    def real(self) -> Tensor:
        """Features of the held-out images."""
        return self.judge.features(self.held_out).cpu()

    def wanted(self, number: int) -> Tensor:
        """The digits, (number,)."""
        return torch.arange(number) % 10

    def figures(self, images: Tensor, wanted: Tensor) -> dict[str, float]:
        """What images (B, 3, 8, 8) of the digits (B,) are worth: FIGURES without the speed; see ``_distances``."""
        drawn, train, held_out = (x.mean(1).flatten(1) for x in (images.cpu(), self.train, self.held_out))
        return {
            **_distances(self.judge.features(images).cpu(), self.real),
            "class_accuracy": float((self.judge.classify(images).cpu() == wanted).double().mean()),
            "copy_rate": features.copy_rate(drawn, train, held_out),
        }

    def floor(self) -> dict[str, float]:
        """The training images' own figures: what a perfect copy of the data would reach."""
        index = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))
        return self.figures(self.train[index], digits.labels()[index])


class Toys:
    """True renders of the toybox, from such cameras as teachers are trained with, and what they say of drawn ones.

    Args:
        prompts: what they show: each as it is when nothing that the caption leaves out varies.
        number: how many renders, each prompt in its turn.
        device: where features are computed.

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
        """Their features."""
        return self.judge.features(self.held_out).cpu()

    def renders(self, seed: int) -> Tensor:
        """As many true images as any other seed gives, (number, 3, 64, 64)."""
        generator, count = torch.Generator().manual_seed(seed), len(self.toys)
        images = torch.empty(self.number, 3, self.judge.size, self.judge.size)
        for i, toy in enumerate(self.toys[: self.number]):
            places = torch.arange(i, self.number, count)
            images[places] = toy.render(renders.draw_cameras(len(places), generator))[0]
        return images

    def wanted(self, number: int) -> Tensor:
        """Indices of toy, main and second colour, (number, 3); -1 for a second colour where there is none."""
        kinds, colours = self.judge.kinds, self.judge.colours
        rows = [
            (kinds.index(t.name), colours.index(t.main), colours.index(t.second) if t.kind.second else -1)
            for t in self.toys
        ]
        return torch.tensor(rows)[torch.arange(number) % len(rows)]

    def figures(self, images: Tensor, wanted: Tensor) -> dict[str, float]:
        """What images (B, 3, 64, 64) are worth: FIGURES without speed and copies; see ``_distances``."""
        drawn, said = self.judge.features(images).cpu(), self.judge.classify(images).cpu()
        right = ((said == wanted) | (wanted < 0)).all(1)
        return {
            **_distances(drawn, self.real),
            "class_accuracy": float(right.double().mean()),
        }

    def floor(self) -> dict[str, float]:
        """Figures of other true renders."""
        return self.figures(self.renders(1), self.wanted(self.number))


def _distances(drawn: Tensor, real: Tensor) -> dict[str, float]:
    """How far features (B, D) are from real ones (N, D); of B below N the kernel distance alone."""
    kernel = {"kid_feat": features.kernel_distance(drawn, real)}
    if len(drawn) < len(real):
        return kernel
    alike = torch.randperm(len(drawn), generator=torch.Generator().manual_seed(0))[: len(real)]
    precision, recall = features.precision_recall(drawn[alike], real)
    return {"fd_feat": features.frechet(drawn, real), **kernel, "precision": precision, "recall": recall}


def real_for(prompts: Sequence[str], number: int, size: int | None = None) -> Real:
    """What generators of these prompts, and of images of this size, are judged by.

    Raises:
        ValueError: they are neither all digits nor toys, or of other sizes than the judges look at.
    """
    found: Digits | Toys = Digits()
    try:
        if not set(found.prompts) <= set(prompts):
            found = Toys(prompts, min(max(number, FEWEST), 2000))
        if size not in (None, found.judge.size):
            raise ValueError(f"its images are of {size} pixels a side, and the judge looks at {found.judge.size}")
    except ValueError as error:
        raise ValueError(f"only generators of all ten digits, or of toys, can be judged so far: {error}") from error
    return found


def measure(
    draw: Draw, number: int = 5000, seeds: int = 3, real: Real | None = None, inception: Inception | None = None
) -> Iterator[dict[str, float]]:
    """Figures of what ``draw`` draws, a row for each seed as it is done; "fid" among them where ``inception`` is given.

    Raises:
        ValueError: one image, which has no distance; or ``inception`` and fewer images than are held out.
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
    prompts, wanted = [real.prompts[i % len(real.prompts)] for i in range(number)], real.wanted(number)
    for seed in range(seeds):
        begun = time.perf_counter()
        images = draw(prompts, seed)
        seconds = time.perf_counter() - begun
        fid = {} if inception is None else {"fid": inception.distance(images, real.held_out)}
        yield {**real.figures(images, wanted), **fid, "samples_per_second": number / seconds}


def summary(rows: list[dict[str, float]]) -> dict[str, Measured]:
    """Mean and spread of every figure."""
    return {name: Measured.of([row[name] for row in rows]) for name in rows[0]}


def by_teacher(teacher: Teacher, sampler: str, steps: int, guidance: float = 1.0) -> Draw:
    """What draws with a teacher."""
    return lambda prompts, seed: sample(teacher, prompts, seed, guidance, None, steps, sampler).cpu()


def by_generator(generator: LoadedGenerator) -> Draw:
    """What draws with a generator."""
    return generator


def table(rows: dict[str, dict[str, Measured]]) -> str:
    """Figures as a Markdown table, a row for each who drew."""
    names = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for who, row in rows.items():
        lines.append(f"| {who} | " + " | ".join(str(row[name]) for name in names) + " |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """What was measured of a generator.

    Args:
        figures: FIGURES and "fd_ratio", the generator's FD-feat over its teacher's, as far as there are enough images.
        rows: the same and the teacher's, by who drew.
        files: what was written.
    """

    figures: dict[str, Measured]
    rows: dict[str, dict[str, Measured]]
    files: list[str]


def judge_generator(
    path: Path,
    number: int = 5000,
    seeds: int = 3,
    note: Callable[[str, int, dict[str, float]], None] = lambda who, seed, row: None,
    fid: bool = False,
    dtype: str | None = None,
) -> Report:
    """Measure a generator of digits or toys and its teacher; writes eval.json, eval.png and the card beside it.

    Args:
        path: its run folder.
        note: told who drew, the seed, and the figures, as each seed is done.
        fid: measure FID, too; see `sds3d.evaluate.inception`.
        dtype: what both compute in; None is the run's own teacher.dtype.

    Raises:
        ValueError: it draws neither digits nor toys, its teacher is gone or is another one now, or FID cannot be had.
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
    inception, found = Inception(painter.device) if fid else None, {}
    guided = by_teacher(teacher, *BEST, scale_of(config.method.scale, 0))
    draws = {"generator": by_generator(painter), "teacher": guided}
    for who, draw in draws.items():
        rows = []
        for row in measure(draw, number, seeds, real, inception):
            note(who, len(rows), row)
            rows.append(row)
        found[who] = rows
    for ours, theirs in zip(found["generator"], found["teacher"]):
        if "fd_feat" in ours:
            ours["fd_ratio"], theirs["fd_ratio"] = ours["fd_feat"] / theirs["fd_feat"], 1.0
    rows = {who: summary(values) for who, values in found.items()}
    report = {**plain(rows["generator"]), "teacher": plain(rows["teacher"]), "images": number, "seeds": seeds}
    command = f"sds3d eval {path} -n {number} --seeds {seeds}" + " --fid" * fid
    command += f" --dtype {dtype}" * (dtype is not None)
    report |= {"machine": machine(painter.device), "command": command}
    report["dtype"] = str(painter.dtype).removeprefix("torch.")
    with replacing(file.parent / "eval.json") as part:
        part.write_text(json.dumps(report, indent=1), encoding="utf-8")
    told = a_few(painter.prompts)
    shown = painter(told * 16, seed=1)
    grid = sheet.contact_sheet(rows_of(shown, len(told)), file.parent / "eval.png", told, sheet.seen(shown))
    write_card(file.parent, config, painter.header["teacher"], table(rows))
    kinds.write_page(Run(file.parent))
    return Report(rows["generator"], rows, [str(file.parent / "eval.json"), str(grid), str(file.parent / CARD)])
