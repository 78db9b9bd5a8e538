"""Few-step generators: the run that trains one, and the saved file, or diffusers pipeline, that draws images."""

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
from sds3d.diffusion.seeded_noise import in_order
from sds3d.media import sheet
from sds3d.runs import generator_parts, report
from sds3d.runs.folder import Run
from sds3d.runtime.distributed import Processes
from sds3d.runtime.files import from_json, replacing
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import shown
from sds3d.runtime.torch_modes import training
from sds3d.students.base import outsized
from sds3d.students.generator import FewStepGenerator, GeneratorConfig, generator_times, images
from sds3d.teachers import small
from sds3d.teachers.base import DTYPES, HFConfig, TeacherConfig
from sds3d.teachers.hf import generator as hf
from sds3d.teachers.hf import generator_scheduler
from sds3d.teachers.hf.teacher import DiffusersTeacher
from sds3d.teachers.load import load_teacher
from sds3d.teachers.small import SmallTeacher

FILE = "generator.safetensors"
FOLDER = "pipeline"  # replaces FILE if the teacher is a diffusers pipeline
CARD = "README.md"
PER_PROMPT = 8  # images of each prompt in grid.png


class Generated:
    """A run that trains a generator.

    Args:
        run: the run folder; None in the processes of rank 1 and above, which write no files.

    Attributes:
        path (Path): the run folder.
        config (DistillConfig): the run's settings.
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
        """Load the trainable generator of a run folder from its last checkpoint.

        `load_generator` loads one that only draws images.

        Raises:
            ValueError: the run, its checkpoint or its teacher is missing or damaged, or the run is of another kind.
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
        """The run folder; in a process without one, the config's folder of runs."""
        return Path(self.config.out) if self.run is None else self.run.path

    @property
    def kernels(self) -> str:
        """The device of the weights, for display."""
        return str(next(self.student.network.parameters()).device)

    def rows(self) -> tuple[list[str], list[Tensor]]:
        """Draw a few prompts, always from the same noise. Returns them, and images (PER_PROMPT, 3, H, W) of each."""
        prompts = a_few(self.student.prompts)
        return prompts, rows_of(self.student.images(prompts * PER_PROMPT, 0).cpu(), len(prompts))

    def picture(self) -> Tensor:
        """Return one image of each of a few prompts, (B, 3, H, W), for a progress picture."""
        images = self.student.images(a_few(self.student.prompts), 0).cpu()  # the first images of `rows`
        return sheet.resize(images, sheet.seen(images))

    def finish(self) -> Iterator[Path]:
        """Write generator.safetensors or pipeline/, its card, grid.png and index.html. Yields each path once written.

        Raises:
            ValueError: the disk is full.
        """
        if self.run is None:
            if self.student.processes.sharded:  # the writing process gathers shards: all must take part in the calls
                self.student.means[0].module.state_dict()
                self.rows()
            return
        with self.run.lock():
            yield from self._files()

    def _files(self) -> Iterator[Path]:
        """Write the files of `finish` in the process of rank 0."""
        if doubt := "" if self.student.processes.sharded else outsized(self.student):
            warnings.warn(f"{self.path}: {doubt}", stacklevel=2)
        assert self.run is not None, "the process that writes"
        scores = self.path / "eval.json"
        stale = scores.is_file() and scores.stat().st_mtime < self.run.checkpoint.stat().st_mtime
        for path in (scores, self.path / "eval.png") if stale else ():  # they were measured on earlier weights
            path.unlink(missing_ok=True)
        yield self.save()
        if not scores.is_file():  # else the card, which has the scores, stays
            write_card(self.path, self.config, self.student.identity)
        yield self.path / CARD
        prompts, rows = self.rows()
        yield sheet.contact_sheet(rows, self.path / "grid.png", prompts, sheet.seen(rows[0]))
        strip = self.path / "progress" / "strip.png"
        if strip.is_file():
            yield strip
        yield report.write_page(self.run, self.PAGE, doubt)

    def save(self) -> Path:
        """Save the first running mean of the weights in the format that `load_generator` reads."""
        student, teacher = self.student, self.student.teacher
        network: Any = student.means[0].module  # has the teacher's architecture
        header = {"generator": json.dumps(asdict(self.config.generator)), "teacher": student.identity}
        header |= {"method": type(self.config.method).__name__, "steps": str(self.config.steps)}
        header["denoiser"] = json.dumps(self.config.method.DENOISER)
        numbers = (
            teacher.levels.network_timesteps(student.times) if isinstance(teacher, DiffusersTeacher) else student.times
        )
        header["times"] = json.dumps(numbers.tolist())
        if isinstance(teacher, DiffusersTeacher):
            header["prompts"] = json.dumps(student.prompts)
            hf.save(teacher, network.state_dict(), student.times, header, self.path / FOLDER)
            return self.path / FOLDER
        assert isinstance(teacher, SmallTeacher), type(teacher)
        small.save(self.path / FILE, network, teacher.text, teacher.vocabulary, student.prompts, header)
        return self.path / FILE


def a_few(prompts: Sequence[str], most: int = 10) -> list[str]:
    """Return at most ``most`` of the prompts, evenly spread over the list."""
    count = min(most, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def rows_of(images: Tensor, count: int) -> list[Tensor]:
    """Split images (N * count, 3, H, W) into ``count`` rows (N, 3, H, W), one per prompt.

    The batch holds an image of every prompt, N times. In this order the noise of an image does not depend on N.
    """
    return list(images.unflatten(0, (-1, count)).transpose(0, 1))


def write_card(path: Path, config: DistillConfig, teacher: str, figures: str = "") -> Path:
    """Write the generator's card into a run folder.

    Args:
        teacher: the teacher's name and fingerprint.
        figures: a Markdown table of measured figures; "" if there are none.
    """
    method, steps = type(config.method).__name__, config.generator.steps
    data = "Its discriminator saw real images" if "real" in config.method.NEEDS else "It saw no real image"
    lines = [
        f"# A generator of {steps} step{'s' if steps > 1 else ''}, distilled by {method}",
        "",
        f"**Teacher.** {teacher}, guidance {plain(Ramp.parse(config.method.scale))}.",
        f"**Method.** {(type(config.method).__doc__ or '').partition(chr(10))[0]}",
        f"**Data.** {data}; it knows only what its teacher knew.",
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
    """The card's lines on how diffusers loads a pipeline; none if there is no pipeline."""
    if not (pipeline / hf.CARD).is_file():
        return []
    return [
        "diffusers can load it, too: it is a pipeline with its own scheduler. Call it with the arguments below; on a "
        "GPU, dtype=torch.bfloat16 takes half the memory. With fewer steps it uses the first of its times, which "
        "diffusers does not do by itself: use `sds3d sample --steps`, or steps= above.",
        "",
        "```python",
        "from diffusers import DiffusionPipeline",
        f'pipe = DiffusionPipeline.from_pretrained("THIS FOLDER/{FOLDER}")',
        f"image = pipe({hf.read(pipeline)['call']}).images[0]",
        "```",
        "",
    ]


class LoadedGenerator:
    """A generator that draws images of prompts.

    Args:
        teacher: the loaded weights, as a teacher of the same architecture.
        header: the header of the generator's file.

    Attributes:
        prompts: the prompts that it was trained on.
        times: t (K,) of its K steps, as in training.
        header: the header's teacher, method, steps of training and settings.
    """

    def __init__(self, teacher: SmallTeacher | DiffusersTeacher, header: Mapping[str, Any]):
        self._teacher = teacher
        try:
            self._config = build(GeneratorConfig, from_json(header["generator"]), "generator")
            self.prompts = convert(tuple[str, ...], from_json(header["prompts"]), "prompts")
            self.times, self._size = _times(teacher, self._config, header.get("times"))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"the generator's header is damaged ({error}); train it again") from error
        self.header = {key: header[key] for key in ("teacher", "method", "steps", "generator")}

    @property
    def device(self) -> torch.device:
        """The device that it computes on."""
        return self._teacher.device

    @property
    def steps(self) -> int:
        """The number of steps that it was trained to draw in."""
        return self._config.steps

    @property
    def image_size(self) -> int:
        """Width and height of its images in pixels."""
        return self._teacher.image_size

    def check(self, prompt: str) -> None:
        """Raise ValueError if it does not know a word of the prompt."""
        self._teacher.check(prompt)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that its network computes in."""
        return self._teacher.dtype

    def __call__(self, prompts: Sequence[str], seed: int = 0, steps: int | None = None, batch: int = 0) -> Tensor:
        """Draw images (B, 3, H, W) in [0, 1], on the CPU.

        Args:
            prompts: B prompts.
            seed: seed of the noise. Image i of a seed depends on its prompt alone, not on B or ``batch``; see
                `sds3d.diffusion.seeded_noise`.
            steps: number of steps, at most the number it was trained for; the first of its ``times`` are used.
            batch: least number of images that are moved from the device together. 0 means 256 images of 64 pixels a
                side, and proportionally fewer larger ones.

        Raises:
            ValueError: a word is unknown, or the number of steps is larger than in training.
        """
        for prompt in dict.fromkeys(prompts):
            self.check(prompt)
        steps = self.steps if steps is None else steps
        if not 1 <= steps <= self.steps:
            raise ValueError(f"steps is {steps}; this generator paints in {self.steps} or fewer")
        if batch < 0:
            raise ValueError(f"batch is {batch}; give a number of images, or 0 for as many as usually fit")
        batch = batch or max(1, 256 * 64**2 // max(self.image_size, 64) ** 2)
        order, on_device, on_cpu = [], [], [torch.zeros(0, 3, self.image_size, self.image_size)]
        teacher = self._teacher
        with training(), torch.inference_mode():
            for rows, piece in images(teacher, teacher.network, self.times[:steps], prompts, seed, self._size):
                order += rows
                on_device.append(piece)
                if sum(map(len, on_device)) >= batch:
                    on_cpu.append(torch.cat(on_device).cpu())
                    on_device.clear()
        return in_order(order, [*on_cpu, *(piece.cpu() for piece in on_device)])


def _times(teacher: SmallTeacher | DiffusersTeacher, config: GeneratorConfig, text: str | None) -> tuple[Tensor, float]:
    """The times (K,) of a saved generator's K steps, as in training, and the scale of its first noise.

    Args:
        text: JSON of K numbers: t for a network of this project, and the network's timesteps for a pipeline. None for
            older files, which do not store them; the times are then computed from the config as they were in training.
    """
    if text is None and isinstance(teacher, DiffusersTeacher):
        return generator_scheduler.scheduler_times(
            teacher.family, teacher.levels, teacher.family.pipe.scheduler, config.steps
        ), 1.0
    if text is None:
        return generator_times(teacher, config)
    most = float(teacher.levels.count) if isinstance(teacher, DiffusersTeacher) else 1.0
    numbers = torch.tensor(convert(tuple[float, ...], from_json(text), "times"), dtype=torch.float64)
    falls = bool((numbers.diff() < 0).all()) and bool(((numbers > 0) & (numbers <= most)).all())
    if len(numbers) != config.steps or not falls:
        raise ValueError(f"times is {shown(text)}, not {config.steps} decreasing numbers above 0, up to {most:g}")
    if isinstance(teacher, DiffusersTeacher):
        return generator_scheduler.t_of_network_timesteps(teacher.levels, numbers), 1.0
    return numbers, float(teacher.schedule.alpha_sigma(numbers[:1])[1])


def find(path: Path) -> Path | None:
    """Find a saved generator: a .safetensors file or a pipeline's folder. Returns None if there is none.

    Args:
        path: the file or folder itself, its run folder, or a folder of runs; then the newest generator is found.
    """
    path = path.expanduser()
    if path.is_file():
        return path if path.suffix == ".safetensors" else None
    if (path / hf.CARD).is_file():
        return path
    own = [path / FILE, *(card.parent for card in path.glob(f"{FOLDER}/{hf.CARD}"))]
    in_runs = [*path.glob(f"[0-9]*/{FILE}"), *(card.parent for card in path.glob(f"[0-9]*/{FOLDER}/{hf.CARD}"))]
    newest = max(in_runs, key=lambda saved: saved.parent, default=None)
    return next((saved for saved in own if saved.exists()), newest)


def _how_to_get_one(path: Path) -> str:
    """Advice for a user whose folder has no generator."""
    if not (path / "config.yaml").is_file():
        return "train one with sds3d distill"
    if of_run(path / "config.yaml").MAKES != "generator":
        return "it is no generator's run; train one with sds3d distill"
    rows = Run.open(path).rows()
    early = f", or have it written as it is: sds3d resume {path} steps={rows[-1]['step']}" if rows else ""
    return f"let it finish: sds3d resume {path}{early}"


@training()
def load_generator(path: str | Path, device: str = "auto", dtype: str = "auto") -> LoadedGenerator:
    """Load a trained generator.

    Args:
        path: its run folder, its generator.safetensors or pipeline, or a folder of runs, of which the newest counts.
        device: "auto", "cpu", "cuda" ...
        dtype: the dtype that it computes in: "auto" (bfloat16 where that is fast), "float32", "bfloat16", or, for a
            pipeline, "float16".

    Raises:
        ValueError: there is no generator, it is damaged, the file is a teacher's, or the dtype is not supported.

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
        header = hf.read(file)
        # a card may be a stranger's: it must not name a folder to write to, nor allow pickles
        settings = {key: value for key, value in header["hf"].items() if key not in ("cache", "allow_pickle")}
        try:
            config = build(HFConfig, settings, "hf")
        except ValueError as error:
            raise ValueError(f"{file / hf.CARD} is damaged ({error}); train the generator again") from error
        pipeline = loading.load(TeacherConfig(str(file), "words", dtype, hf=config), pick_device(device))
        pipeline.embedder.all_views = False
        return LoadedGenerator(pipeline, header)
    if dtype == "float16":
        raise ValueError(f"dtype float16 is for diffusers pipelines, and {file} is none; give float32 or bfloat16")
    torch_dtype = None if dtype == "auto" else getattr(torch, dtype)
    network = small.load(file, "words", pick_device(device), torch_dtype)
    if "generator" not in network.header:
        raise ValueError(f"{file} is a teacher's, not a generator's; distil it: sds3d distill --teacher {file}")
    return LoadedGenerator(network, network.header)
