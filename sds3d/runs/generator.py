"""A trained generator: its run folder while it learns, and the one file, or diffusers pipeline, that it becomes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sds3d.config.load import DistillConfig, changed, name_of, of_run
from sds3d.config.typed import build, convert, plain
from sds3d.diffusion.draws import in_order
from sds3d.media import sheet
from sds3d.runs import generator_parts, report
from sds3d.runs.folder import Run
from sds3d.runtime.distributed import Processes
from sds3d.runtime.files import from_json, replacing
from sds3d.runtime.modes import training
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import shown
from sds3d.students.base import outsized
from sds3d.students.generator import FewStepGenerator, GeneratorConfig, begun_at, images
from sds3d.teachers import small
from sds3d.teachers.base import DTYPES, HFConfig, TeacherConfig
from sds3d.teachers.hf import generator as hf
from sds3d.teachers.hf import generator_scheduler
from sds3d.teachers.hf.teacher import DiffusersTeacher
from sds3d.teachers.load import load_teacher
from sds3d.teachers.small import SmallTeacher

FILE = "generator.safetensors"
FOLDER = "pipeline"  # in its place, where the teacher is a diffusers pipeline
CARD = "README.md"
SHOWN = 8  # images a prompt in grid.png


class Generated:
    """A run that trains a generator.

    Args:
        run: its folder; None in a process that only helps another one.

    Attributes:
        path (Path): the run folder.
        config (DistillConfig): everything that made it.
        student (nn.Module): the generator.
    """

    PAGE: ClassVar[report.PageFacts] = report.PageFacts(
        pictures={"What it paints": "grid.png", "Beside real images and its teacher": "eval.png"},
        commands=("sds3d sample {run}", "sds3d eval {run}"),
    )

    def __init__(self, run: Run | None, config: DistillConfig, student: FewStepGenerator):
        self.run, self.config, self.student = run, config, student

    @classmethod
    @training()
    def open(cls, path: str | Path, device: str = "auto") -> Generated:
        """The generator of a run folder, as its last checkpoint has it: one that can go on learning. `load_generator`
        gives one that only paints.

        Raises:
            ValueError: no such run, no checkpoint, a damaged one, a run of another kind, or its teacher is gone.
        """
        run = Run.open(path)
        config = of_run(run.config)
        if config.MAKES != "generator":
            raise ValueError(f"{run.path} makes {config.MAKES}, not a generator")
        config = changed(config, {"device": device})
        teacher = load_teacher(config.teacher, config.device)
        generator_parts.check_teacher(config, teacher)
        student = generator_parts.build_student(config, teacher, Processes())
        run.load_student(student)
        return cls(run, config, student)

    @property
    def path(self) -> Path:
        """The run folder; of a generator without one, what its config names."""
        return Path(self.config.out) if self.run is None else self.run.path

    @property
    def kernels(self) -> str:
        """Where the weights are."""
        return str(next(self.student.network.parameters()).device)

    def rows(self) -> tuple[list[str], list[Tensor]]:
        """A few prompts, and SHOWN images of each, (SHOWN, 3, H, W), always of the same noise."""
        prompts = a_few(self.student.prompts)
        return prompts, rows_of(self.student.images(prompts * SHOWN, 0).cpu(), len(prompts))

    def picture(self) -> Tensor:
        """An image of each of a few prompts, for a progress picture."""
        images = self.student.images(a_few(self.student.prompts), 0).cpu()  # the first of each row
        return sheet.resize(images, sheet.seen(images))

    def finish(self) -> Iterator[Path]:
        """Write generator.safetensors or pipeline/, its card, grid.png and index.html, one after the other;
        progress/strip.png is there.

        Raises:
            ValueError: the disk is full.
        """
        if self.run is None:
            if (
                self.student.processes.sharded
            ):  # the process that writes needs every part, of the weights and of the grid
                self.student.means[0].module.state_dict()
                self.rows()
            return
        with self.run.lock():
            yield from self._files()

    def _files(self) -> Iterator[Path]:
        """Write them."""
        if doubt := "" if self.student.processes.sharded else outsized(self.student):
            warnings.warn(f"{self.path}: {doubt}", stacklevel=2)
        assert self.run is not None, "the process that writes"
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
        yield report.write_page(self.run, self.PAGE, doubt)

    def save(self) -> Path:
        """Write the first running mean as what `load_generator` reads."""
        student, teacher = self.student, self.student.teacher
        network: Any = student.means[0].module  # of the teacher's form
        told = {"generator": json.dumps(asdict(self.config.generator)), "teacher": student.identity}
        told |= {"method": type(self.config.method).__name__, "steps": str(self.config.steps)}
        told["denoiser"] = json.dumps(self.config.method.DENOISER)
        numbers = (
            teacher.levels.network_timesteps(student.times) if isinstance(teacher, DiffusersTeacher) else student.times
        )
        told["times"] = json.dumps(numbers.tolist())
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


def rows_of(images: Tensor, count: int) -> list[Tensor]:
    """A row (N, 3, H, W) for each of ``count`` prompts, of N images of the first, the second ... and so N times: then
    an image's place, and its noise, depend on no N."""
    return list(images.unflatten(0, (-1, count)).transpose(0, 1))


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
        "and on a GPU takes half the memory with dtype=torch.bfloat16. Fewer steps are the first of its times, which "
        "diffusers does not take by itself: use `sds3d sample --steps`, or steps= above.",
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
        times: t (K,) of its K steps, as in training.
        told: what its file says: teacher, method, steps of training, settings.
    """

    def __init__(self, teacher: SmallTeacher | DiffusersTeacher, told: Mapping[str, Any]):
        self._teacher = teacher
        try:
            self._config = build(GeneratorConfig, from_json(told["generator"]), "generator")
            self.prompts = convert(tuple[str, ...], from_json(told["prompts"]), "prompts")
            self.times, self._size = _times(teacher, self._config, told.get("times"))
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

    @property
    def dtype(self) -> torch.dtype:
        """What its network computes in."""
        return self._teacher.dtype

    def __call__(self, prompts: Sequence[str], seed: int = 0, steps: int | None = None, batch: int = 0) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], on the CPU.

        Args:
            prompts: B of them.
            seed: of the noise. Image i of a seed depends on its prompt alone: not on B, and not on ``batch``
                (`sds3d.diffusion.draws` says how).
            steps: fewer than it was trained for are possible, not more: the first of its ``times``, as in training.
            batch: how many images at least are made before they leave the device together; 0 is 256 of 64 pixels a
                side, and as many fewer as they are larger.

        Raises:
            ValueError: an unknown word, or a number of steps that it was not trained for.
        """
        for prompt in dict.fromkeys(prompts):
            self.check(prompt)
        steps = self.steps if steps is None else steps
        if not 1 <= steps <= self.steps:
            raise ValueError(f"steps is {steps}; this generator paints in {self.steps} or fewer")
        if batch < 0:
            raise ValueError(f"batch is {batch}; give a number of images, or 0 for as many as usually fit")
        batch = batch or max(1, 256 * 64**2 // max(self.image_size, 64) ** 2)
        order, kept, found = [], [], [torch.zeros(0, 3, self.image_size, self.image_size)]
        teacher = self._teacher
        with training(), torch.inference_mode():
            for rows, piece in images(teacher, teacher.network, self.times[:steps], prompts, seed, self._size):
                order += rows
                kept.append(piece)
                if sum(map(len, kept)) >= batch:
                    found.append(torch.cat(kept).cpu())
                    kept.clear()
        return in_order(order, [*found, *(piece.cpu() for piece in kept)])


def _times(teacher: SmallTeacher | DiffusersTeacher, config: GeneratorConfig, said: str | None) -> tuple[Tensor, float]:
    """The times (K,) of a saved generator's K steps, as in training, and the size of its first noise.

    Args:
        said: JSON of the times: of a network's own, and of a pipeline's what its network is told. Older files do not
            say them, and give for all steps the same again.
    """
    if said is None and isinstance(teacher, DiffusersTeacher):
        return generator_scheduler.scheduler_times(
            teacher.family, teacher.levels, teacher.family.pipe.scheduler, config.steps
        ), 1.0
    if said is None:
        return begun_at(teacher, config)
    most = float(teacher.levels.count) if isinstance(teacher, DiffusersTeacher) else 1.0
    found = torch.tensor(convert(tuple[float, ...], from_json(said), "times"), dtype=torch.float64)
    falls = bool((found.diff() < 0).all()) and bool(((found > 0) & (found <= most)).all())
    if len(found) != config.steps or not falls:
        raise ValueError(f"times is {shown(said)}, not {config.steps} falling numbers above 0, up to {most:g}")
    if isinstance(teacher, DiffusersTeacher):
        return generator_scheduler.t_of_network_timesteps(teacher.levels, found), 1.0
    return found, float(teacher.schedule.alpha_sigma(found[:1])[1])


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
    if of_run(path / "config.yaml").MAKES != "generator":
        return "it is no generator's run; train one with sds3d distill"
    rows = Run.open(path).rows()
    early = f", or have it written as it is: sds3d resume {path} steps={rows[-1]['step']}" if rows else ""
    return f"let it finish: sds3d resume {path}{early}"


@training()
def load_generator(path: str | Path, device: str = "auto", dtype: str = "auto") -> LoadedGenerator:
    """A trained generator, from its run folder, its generator.safetensors or pipeline, or a folder of runs: the newest.

    Args:
        dtype: what it computes in: "auto" (bfloat16 where that is fast), "float32", "bfloat16", or of a pipeline
            "float16".

    Raises:
        ValueError: there is none, it is damaged, it is a teacher's file, or the dtype is not for it.

    Examples:
        >>> generator = load_generator("outputs/00001-digits-diffinstruct", dtype="float32")
        >>> generator(["a handwritten seven"] * 4, seed=0).shape  # in [0, 1]
        torch.Size([4, 3, 8, 8])
    """
    from sds3d.runtime.device import pick_device
    from sds3d.teachers.hf import loading

    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; give {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    file = find(Path(path))
    if file is None:
        raise ValueError(f"{path} holds no {FILE}; {_how_to_get_one(Path(path).expanduser())}")
    if file.is_dir():
        told = hf.read(file)
        # a stranger's card neither names where to write nor lets pickles run
        settings = {key: value for key, value in told["hf"].items() if key not in ("cache", "allow_pickle")}
        try:
            found = build(HFConfig, settings, "hf")
        except ValueError as error:
            raise ValueError(f"{file / hf.CARD} is damaged ({error}); train the generator again") from error
        pipeline = loading.load(TeacherConfig(str(file), "words", dtype, hf=found), pick_device(device))
        pipeline.embedder.all_views = False
        return LoadedGenerator(pipeline, told)
    if dtype == "float16":
        raise ValueError(f"dtype float16 is for diffusers pipelines, and {file} is none; give float32 or bfloat16")
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    network = small.load(file, "words", pick_device(device), wanted)
    if "generator" not in network.header:
        raise ValueError(f"{file} is a teacher's, not a generator's; distil it: sds3d distill --teacher {file}")
    return LoadedGenerator(network, network.header)
