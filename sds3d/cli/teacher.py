"""Commands about teachers: draw with one, list its words, train one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from sds3d.cli.options import spread
from sds3d.cli.shared import AllowPickle, DType, Overrides, Quiet, Teacher, finite, interruption, user_path

if TYPE_CHECKING:
    from sds3d.teachers.base import TeacherConfig
    from sds3d.teachers.training.settings import FitConfig

app = typer.Typer(no_args_is_help=True, help="Look at, check or train the teacher (the 2D diffusion model).")


@dataclass(frozen=True)
class SampleOptions:
    """The flags of sample."""

    number: Annotated[int, Option("-n", "--number", min=1, max=256, help="how many images")] = 8
    out: Annotated[Path, Option("--out", "-o", help="a .png or .jpg", parser=user_path)] = Path("grid.png")
    orbit: Annotated[bool, Option("--orbit", help="draw from cameras evenly around the object")] = False
    seed: Annotated[int, Option(min=0, max=2**62 - 1, help="seed of the noise")] = 0
    guidance: Annotated[
        float, Option(min=-1e4, max=1e4, callback=finite, help="scale s of eps_uncond + s (eps_cond - eps_uncond)")
    ] = 2.0
    sampler: Annotated[str, Option(help="ddim, ddpm, heun (two evaluations a step) or dpm++")] = "ddim"
    steps: Annotated[int, Option(min=1, max=10_000, help="steps of the sampler")] = 30
    teacher: Teacher = "small"
    dtype: DType = "auto"
    allow_pickle: AllowPickle = False


def settings_of(options: SampleOptions, overrides: list[str] | None) -> TeacherConfig:
    """Build a teacher's config from flags and the settings teacher.*, as teacher.hf.size=256.

    Raises:
        ValueError: a key is unknown or not the teacher's, or a value is not allowed.
    """
    from sds3d.config.load import parse_overrides
    from sds3d.config.typed import build, merge
    from sds3d.teachers.base import TeacherConfig

    settings = parse_overrides(overrides or [])
    layer = settings.pop("teacher", {})
    if settings or not isinstance(layer, dict):
        wrong = next(iter(settings), "teacher")
        raise ValueError(f"{wrong} is no setting of a teacher; give those of a run, such as teacher.hf.size=256")
    flags = {"name": options.teacher, "dtype": options.dtype}
    flags |= {"hf": {"allow_pickle": True}} if options.allow_pickle else {}
    return build(TeacherConfig, merge(flags, layer), "teacher")


@app.command()
@spread
def sample(
    prompt: Annotated[str, Argument(help='a caption; view words count, as in "a red mug, front view"')],
    overrides: Overrides = None,
    options: SampleOptions = SampleOptions(),
) -> None:
    """Draw images with the teacher itself. An asset can only become what its teacher can draw.

    [bold]Examples[/bold]

      sds3d teacher sample "a red mug, front view" -n 8 -o grid.png

      sds3d teacher sample "a red mug" --orbit

      sds3d teacher sample "a handwritten seven" --teacher digits --sampler heun --steps 18

      sds3d teacher sample "a corgi" --teacher FOLDER teacher.hf.size=256      [dim]# of a diffusers pipeline[/dim]
    """
    from sds3d import cameras
    from sds3d.media import sheet
    from sds3d.teachers.drawing import sample as draw
    from sds3d.teachers.load import load_teacher

    o, judge = options, load_teacher(settings_of(options, overrides))
    judge.check(prompt)
    if o.orbit and judge.views != "camera":
        raise ValueError(f"the teacher {o.teacher} takes no camera; leave --orbit out")
    turn = cameras.orbit(o.number) if o.orbit else None
    images = draw(judge, [prompt] * o.number, o.seed, o.guidance, turn, o.steps, o.sampler)
    print(sheet.contact_sheet(list(images.split(8)), o.out, size=sheet.seen(images)))


@app.command()
def words(teacher: Teacher = "small") -> None:
    """List the words the teacher knows.

    [bold]Example[/bold]

      sds3d teacher words
    """
    from sds3d.teachers.base import HasVocabulary, TeacherConfig
    from sds3d.teachers.hf import loading
    from sds3d.teachers.load import load_teacher

    if loading.is_pipeline(teacher):  # checked first, so that no weights are loaded
        raise ValueError(f"the teacher {teacher} reads any words: it has no list of them")
    loaded = load_teacher(TeacherConfig(teacher))
    assert isinstance(loaded, HasVocabulary), type(loaded)
    print(" ".join(loaded.vocabulary))


@app.command(name="train")
def train_teacher(
    data: Annotated[str, Argument(metavar="DATA", help="toybox, digits, or a folder of images with captions")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        Option("--out", "-o", help="folder for checkpoints, weights, sample grids and the loss", parser=user_path),
    ] = None,
    resume: Annotated[bool, Option("--resume", help="resume the training in that folder")] = False,
    device: Annotated[str, Option(help="auto, cpu or cuda")] = "auto",
    quiet: Quiet = False,
) -> None:
    """Train a teacher: on your own images with captions, on handwritten digits, or on the toybox.

    A folder holds images, and either a .txt beside each image with its captions, one per line, or a table: captions.csv
    with the columns file and caption, or captions.jsonl (or metadata.csv or metadata.jsonl with file_name and text).
    Images are resized to size=32 or 64 pixels; transparent parts become white. The teacher will know the words of the
    captions, in any script. Checkpoints and sample grids are saved regularly, and on Ctrl-C. Use the trained teacher
    with --teacher FOLDER.

    [bold]Examples[/bold]

      sds3d teacher train my-pictures -o outputs/my-teacher size=32 steps=10000

      sds3d teacher train digits -o outputs/digits      [dim]# 20 minutes on a core[/dim]

      sds3d teacher train toybox -o outputs/toybox      [dim]# hours; renders 1.2 GB first[/dim]
    """
    from sds3d.config.load import parse_overrides
    from sds3d.runs.progress import Clock
    from sds3d.runtime.device import pick_device
    from sds3d.teachers.training import fit, sources

    folder = user_path(data).resolve()
    out = out or Path("outputs") / f"{folder.name}-teacher"
    data = data if data in ("toybox", "digits") else str(folder)  # an absolute path, so that --resume recognises it
    settings = _settings(data, out, resume, parse_overrides(overrides or []))
    source, skipped = sources.build_source(settings.data, settings.size, settings.colours)
    if skipped:
        print(*(f"skipped: {line}" for line in skipped), f"{len(skipped)} skipped", sep="\n", file=sys.stderr)
    fit.require(out, settings, source)  # before the work
    clock, row = Clock(), None
    rows = fit.train(out, settings, source, resume, pick_device(device))
    with interruption() as stopped:
        _prepare(source.prepare(out, settings.images, settings.seed), quiet, stopped)
        for row in rows:
            if not quiet and (row.step % 50 == 0 or row.step == row.total):
                line = f"{clock.line(row.step, row.total, row.seconds)}  loss {row.loss:.4f}"
                print(line, file=sys.stderr, flush=True)
            if stopped:
                break
    rows.close()
    if row is not None and row.step < row.total:
        print(f"stopped after step {row.step} of {row.total}; go on with --resume", file=sys.stderr)
        raise typer.Exit(130)
    print(out / "teacher.safetensors")


def _settings(data: str, out: Path, resume: bool, layer: dict[str, Any]) -> FitConfig:
    """The settings of a training. Raises ValueError if one is not allowed."""
    from sds3d.config.typed import build, merge, plain
    from sds3d.teachers.training.fit import settings_of
    from sds3d.teachers.training.settings import FitConfig

    if "data" in layer:
        raise ValueError(f"data is the first argument, {data}: name other data there, and leave data= out")
    base = settings_of(out) if resume else {**plain(FitConfig.usual(data)), "data": data}
    settings = build(FitConfig, merge(base, layer))
    size = FitConfig.usual(data).size
    if data in ("toybox", "digits") and settings.size != size:
        raise ValueError(f"size is {settings.size}, and the pictures of {data} are {size} pixels a side; leave it out")
    if resume and settings.data != data:
        raise ValueError(f"{out} was trained on {settings.data}, not on {data}; name that, or another --out")
    return settings


def _prepare(counts: Iterator[int], quiet: bool, stopped: list[int]) -> None:
    """Wait until the training images are made, and print progress every 1000 images.

    Args:
        counts: yields the number of images made so far.
        stopped: not empty once Ctrl-C was pressed.
    """
    last = 0
    for done in counts:
        if not quiet and (done - last >= 1000 or stopped):
            print(f"{done} training images are ready", file=sys.stderr, flush=True)
            last = done
        if stopped:
            raise typer.Exit(130)
