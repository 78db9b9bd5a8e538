"""A trained generator: its run folder while it learns, and the one file, or diffusers pipeline, that it becomes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sds3d import report
from sds3d.config import DistillConfig, name_of, of_run
from sds3d.export import sheet
from sds3d.files import from_json, replacing
from sds3d.generators.one_step import Generator, GeneratorConfig, begun_at, paint
from sds3d.ramp import Ramp
from sds3d.runs import Run
from sds3d.students import outsized
from sds3d.teachers import small
from sds3d.teachers.base import HFConfig, TeacherConfig
from sds3d.teachers.hf import generator as hf
from sds3d.teachers.hf.teacher import DiffusersTeacher
from sds3d.teachers.small import SmallTeacher
from sds3d.transfer import onto
from sds3d.typed import build, convert, plain

FILE = "generator.safetensors"
FOLDER = "pipeline"  # in its place, where the teacher is a diffusers pipeline
CARD = "README.md"
SHOWN = 8  # images a prompt in grid.png


class Generated:
    """A run that trains a generator.

    Args:
        run: its folder; None in a process that only helps another one.

    Attributes:
        path: the run folder.
        config: everything that made it.
        student: the generator.
    """

    def __init__(self, run: Run | None, config: DistillConfig, student: Generator):
        self.run, self.config, self.student = run, config, student

    @property
    def path(self) -> Path:
        return Path(self.config.out) if self.run is None else self.run.path

    @property
    def kernels(self) -> str:
        """Where the weights are."""
        return str(next(self.student.network.parameters()).device)

    def rows(self) -> tuple[list[str], list[Tensor]]:
        """A few prompts, and SHOWN images of each, (SHOWN, 3, H, W), always of the same noise."""
        prompts, generator = a_few(self.student.prompts), torch.Generator().manual_seed(0)
        images = self.student.images([p for p in prompts for _ in range(SHOWN)], generator)
        return prompts, list(images.cpu().split(SHOWN))

    def picture(self) -> Tensor:
        """An image of each of a few prompts, for a progress picture."""
        images = torch.stack([row[0] for row in self.rows()[1]])
        return sheet.resize(images, sheet.seen(images))

    def finish(self) -> Iterator[Path]:
        """Write generator.safetensors or pipeline/, its card, grid.png and index.html, one after the other;
        progress/strip.png is there.

        Raises:
            ValueError: the disk is full.
        """
        if self.run is None:
            if self.student.share.sharded:  # the process that writes needs every part, of the weights and of the grid
                self.student.means[0].module.state_dict()
                self.rows()
            return
        with self.run.lock():
            yield from self._files()

    def _files(self) -> Iterator[Path]:
        """Write them."""
        if doubt := "" if self.student.share.sharded else outsized(self.student):
            warnings.warn(f"{self.path}: {doubt}", stacklevel=2)
        judged = self.path / "eval.json"
        stale = judged.is_file() and judged.stat().st_mtime < self.run.checkpoint.stat().st_mtime
        for old in (judged, self.path / "eval.png") if stale else ():  # they were of other weights
            old.unlink(missing_ok=True)
        yield self.save()
        if not judged.is_file():  # the card has its figures
            write_card(self.path, self.config, self.student.identity)
        yield self.path / CARD
        prompts, rows = self.rows()
        yield sheet.contact_sheet(rows, self.path / "grid.png", prompts, sheet.seen(rows[0]))
        strip = self.path / "progress" / "strip.png"
        if strip.is_file():
            yield strip
        yield report.write_page(self.run, doubt)

    def save(self) -> Path:
        """Write the first running mean as what `load_generator` reads."""
        student, teacher, network = self.student, self.student.teacher, self.student.means[0].module
        told = {"generator": json.dumps(asdict(self.config.generator)), "teacher": student.identity}
        told |= {"method": type(self.config.method).__name__, "steps": str(self.config.steps)}
        if isinstance(teacher, DiffusersTeacher):
            told["prompts"] = json.dumps(student.prompts)
            hf.save(teacher, network.state_dict(), student.times, told, self.path / FOLDER)
            return self.path / FOLDER
        assert isinstance(teacher, SmallTeacher), type(teacher)
        small.save(self.path / FILE, network, teacher.text, teacher.vocabulary, student.prompts, told)
        return self.path / FILE


def a_few(prompts: Sequence[str], most: int = 10) -> list[str]:
    """At most ``most`` of them, evenly taken."""
    count = min(most, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def write_card(path: Path, config: DistillConfig, teacher: str, figures: str = "") -> Path:
    """The generator's card: teacher, method, data, command, and figures where they were measured."""
    method, steps = type(config.method).__name__, config.generator.steps
    seen = "Its discriminator saw real images" if "real" in config.method.NEEDS else "It saw no real image"
    lines = [
        f"# A generator of {steps} step{'s' if steps > 1 else ''}, distilled by {method}",
        "",
        f"**Teacher.** {teacher}, guidance {plain(Ramp.parse(config.method.scale))}.",
        f"**Method.** {(type(config.method).__doc__ or '').partition(chr(10))[0]}",
        f"**Data.** {seen}; what it knows is what its teacher knew.",
        f"**Command.** `sds3d distill --teacher {config.teacher.name} --method {name_of(config.method)} "
        f"--seed {config.seed} steps={config.steps} generator.steps={steps} generator.batch={config.generator.batch}`; "
        "config.yaml beside this file has every setting.",
        "",
        "```python",
        "import sds3d",
        'gen = sds3d.load_generator("THIS FOLDER")',
        'images = gen(["a prompt"] * 16, seed=0)  # (16, 3, H, W) in [0, 1]',
        "```",
        "",
        *_in_diffusers(path / FOLDER),
        figures or ("" if (path / FOLDER).is_dir() else f"Not measured yet: `sds3d eval {path.name}`."),
    ]
    with replacing(path / CARD) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path / CARD


def _in_diffusers(pipeline: Path) -> list[str]:
    """The card's lines on how diffusers loads a pipeline; none where there is none."""
    if not (pipeline / hf.CARD).is_file():
        return []
    return [
        "It is a diffusers pipeline, too, with a scheduler of its own; it wants to be called as it says here, "
        "and on a GPU takes half the memory with dtype=torch.bfloat16.",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        f'pipe = DiffusionPipeline.from_pretrained("THIS FOLDER/{FOLDER}")',
        f"image = pipe({hf.read(pipeline)['call']}).images[0]",
        "```",
        "",
    ]


class LoadedGenerator:
    """A generator that is called: prompts in, images out.

    Args:
        teacher: what the generator was saved as.
        told: what its file says.

    Attributes:
        prompts: what it learnt to draw.
        told: what its file says: teacher, method, steps of training, settings.
    """

    def __init__(self, teacher: SmallTeacher | DiffusersTeacher, told: Mapping[str, Any]):
        self._teacher = teacher
        try:
            self._config = build(GeneratorConfig, from_json(told["generator"]), "generator")
            self.prompts = convert(tuple[str, ...], from_json(told["prompts"]), "prompts")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"the generator's header is damaged ({error}); train it again") from error
        self.told = {key: told[key] for key in ("teacher", "method", "steps", "generator")}

    @property
    def device(self) -> torch.device:
        """Where it paints."""
        return self._teacher.device

    @property
    def steps(self) -> int:
        """Of the generator."""
        return self._config.steps

    @property
    def image_size(self) -> int:
        """Pixels a side of what it paints."""
        return self._teacher.image_size

    def check(self, prompt: str) -> None:
        """Raises ValueError where it does not know a word of the prompt."""
        self._teacher.check(prompt)

    def __call__(self, prompts: Sequence[str], seed: int = 0, steps: int | None = None, batch: int = 0) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], on the CPU.

        Args:
            prompts: B of them.
            seed: of the noise; the same prompts and seed give the same images, whatever ``batch`` is.
            steps: fewer than it was trained for are possible, not more.
            batch: images at a time; 0 is 256 of 64 pixels a side, and as many fewer as they are larger.

        Raises:
            ValueError: an unknown word, or a number of steps that it was not trained for.
        """
        for prompt in dict.fromkeys(prompts):
            self.check(prompt)
        steps = self.steps if steps is None else steps
        if not 1 <= steps <= self.steps:
            raise ValueError(f"steps is {steps}; this generator paints in {self.steps} or fewer")
        generator, told = torch.Generator().manual_seed(seed), list(prompts)
        when, size = self._begun_at(steps)
        batch = batch or max(1, 256 * 64**2 // max(self._teacher.image_size, 64) ** 2)
        noise = torch.randn((steps, len(told), *self._teacher.shape), generator=generator)
        found = []
        with torch.inference_mode():
            for first in range(0, len(told), batch):
                part = [onto(fresh[first : first + batch], self._teacher.device) for fresh in noise]
                x = paint(self._teacher, self._teacher.network, when, part, told[first : first + batch], size)
                found.append(self._teacher.decode(x).cpu())
        return torch.cat(found) if found else torch.zeros(0, 3, *[self._teacher.image_size] * 2)

    def _begun_at(self, steps: int) -> tuple[Tensor, float]:
        """The times of so many steps, and the size of the first noise."""
        teacher = self._teacher
        if isinstance(teacher, DiffusersTeacher):  # as its pipeline has it
            return hf.times(teacher.family, teacher.levels, teacher.family.pipe.scheduler, steps), 1.0
        when, size = begun_at(teacher, self._config)
        return when[:steps], size


def find(path: Path) -> Path | None:
    """The generator's file, or its pipeline's folder, in a run folder; the newest in a folder of runs; or itself; None
    where is none."""
    path = path.expanduser()
    if path.is_file():
        return path if path.suffix == ".safetensors" else None
    if (path / hf.CARD).is_file():
        return path
    here = [path / FILE, *(card.parent for card in path.glob(f"{FOLDER}/{hf.CARD}"))]
    runs = [*path.glob(f"[0-9]*/{FILE}"), *(card.parent for card in path.glob(f"[0-9]*/{FOLDER}/{hf.CARD}"))]
    return next((one for one in here if one.exists()), max(runs, key=lambda one: one.parent, default=None))


def _how_to_get_one(path: Path) -> str:
    """What a user can do about a folder without a generator."""
    if not (path / "config.yaml").is_file():
        return "train one with sds3d distill"
    if not isinstance(of_run(path / "config.yaml"), DistillConfig):
        return "it is no generator's run; train one with sds3d distill"
    rows = Run.open(path).rows()
    early = f", or have it written as it is: sds3d resume {path} steps={rows[-1]['step']}" if rows else ""
    return f"let it finish: sds3d resume {path}{early}"


def load_generator(path: str | Path, device: str = "auto") -> LoadedGenerator:
    """A trained generator, from its run folder, its generator.safetensors or pipeline, or a folder of runs: the newest.

    Raises:
        ValueError: there is none, it is damaged, or it is a teacher's file.
    """
    from sds3d import make
    from sds3d.teachers.hf import loading

    file = find(Path(path))
    if file is None:
        raise ValueError(f"{path} holds no {FILE}; {_how_to_get_one(Path(path).expanduser())}")
    if file.is_dir():
        told = hf.read(file)
        settings = {key: value for key, value in told["hf"].items() if key != "cache"}  # a stranger's is not written to
        try:
            found = build(HFConfig, settings, "hf")
        except ValueError as error:
            raise ValueError(f"{file / hf.CARD} is damaged ({error}); train the generator again") from error
        pipeline = loading.load(TeacherConfig(str(file), "words", hf=found), make.pick_device(device))
        pipeline.words.sided = False
        return LoadedGenerator(pipeline, told)
    network = small.load(file, "words", make.pick_device(device))
    if "generator" not in network.told:
        raise ValueError(f"{file} is a teacher's, not a generator's; distil it: sds3d distill --teacher {file}")
    return LoadedGenerator(network, network.told)
