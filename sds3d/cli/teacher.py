"""Commands about the teacher: sample, words, train."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from sds3d.cli.shared import Overrides, Quiet, Teacher, interruption

app = typer.Typer(no_args_is_help=True, help="Look at, check or train the teacher (the 2D diffusion model).")


@app.command()
def sample(
    prompt: Annotated[str, Argument(help='a caption; view words count, as in "a red mug, side view"')],
    number: Annotated[int, Option("-n", "--number", min=1, max=256, help="how many images")] = 8,
    out: Annotated[Path, Option("--out", "-o", help="a .png or .jpg")] = Path("grid.png"),
    orbit: Annotated[bool, Option("--orbit", help="give the exact cameras of one turn around the object")] = False,
    seed: Annotated[int, Option(help="of the noise")] = 0,
    guidance: Annotated[float, Option(help="scale s of eps_uncond + s (eps_cond - eps_uncond)")] = 2.0,
    teacher: Teacher = "small",
) -> None:
    """Draw images with the teacher itself: what it can and cannot draw is what an asset can be.

    [bold]Examples[/bold]

      sds3d teacher sample "a red mug, side view" -n 8 -o grid.png

      sds3d teacher sample "a red mug" --orbit
    """
    from sds3d import cameras, make
    from sds3d.export import sheet
    from sds3d.teachers import fit
    from sds3d.teachers.base import TeacherConfig

    judge = make.load_teacher(TeacherConfig(teacher))
    judge.check(prompt)
    turn = cameras.orbit(number) if orbit else None
    images = fit.sample(judge, prompt, number, seed, guidance, cameras=turn)
    print(sheet.contact_sheet(list(images.split(8)), out))


@app.command()
def words(teacher: Teacher = "small") -> None:
    """List the words the teacher knows.

    [bold]Example[/bold]

      sds3d teacher words
    """
    from sds3d import make
    from sds3d.teachers.base import TeacherConfig

    print(" ".join(make.load_teacher(TeacherConfig(teacher)).vocabulary))


@app.command(name="train")
def train_teacher(
    out: Annotated[Path, Argument(metavar="FOLDER", help="checkpoints, weights, sample grids and the loss go there")],
    overrides: Overrides = None,
    resume: Annotated[bool, Option("--resume", help="go on with the training in that folder")] = False,
    device: Annotated[str, Option(help="auto, cpu or cuda")] = "auto",
    quiet: Quiet = False,
) -> None:
    """Train a teacher on the toybox (hours on a CPU). It saves now and then and on Ctrl-C; --resume goes on from there.

    The training images (413 MB) are rendered first, into FOLDER/renders.

    On a CPU that has nothing else to do, OMP_WAIT_POLICY=active makes it up to twice as fast.

    [bold]Example[/bold]

      OMP_WAIT_POLICY=active sds3d teacher train outputs/teacher steps=16000 batch=32
    """
    from sds3d import make
    from sds3d.config import parse_overrides
    from sds3d.data import renders
    from sds3d.progress import Clock
    from sds3d.teachers import fit
    from sds3d.typed import build, merge

    given = parse_overrides(overrides or [])
    settings = build(fit.FitConfig, merge(fit.settings_of(out), given) if resume else given)
    clock, row, last = Clock(), None, 0
    rows = fit.train(out, settings, resume, make.pick_device(device))
    with interruption() as stopped:
        for done in renders.build(out / "renders", settings.images, settings.seed):
            if not quiet and done - last >= 1000:
                print(f"rendered {done} of {settings.images} training images", file=sys.stderr, flush=True)
                last = done
            if stopped:
                raise typer.Exit(130)
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
