"""The command line: parses, calls, prints. Results go to stdout, progress and complaints to stderr.

Exit codes: 0 done, 2 a mistake of the user's (one sentence on stderr), 1 the run diverged, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer import Argument, Option

from sds3d.options import spread

if TYPE_CHECKING:
    from sds3d.asset import Asset
    from sds3d.progress import Silent
    from sds3d.train import Step

app = typer.Typer(
    name="sds3d",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help='Text to 3D by score distillation. Start with:  sds3d generate "a red mug"',
)
teacher_app = typer.Typer(no_args_is_help=True, help="Look at, check or train the teacher (the 2D diffusion model).")
app.add_typer(teacher_app, name="teacher")

Overrides = Annotated[
    list[str] | None, Argument(metavar="[KEY=VALUE]...", help="settings, as in steps=800 render.resolution=64")
]
RunFolder = Annotated[Path, Argument(metavar="RUN", help="a run folder, as in outputs/00001-a-red-mug")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="no progress; print the results only")]
Json = Annotated[bool, Option("--json", help="no progress; print one JSON object")]

SCORES = ("iou", "psnr", "chamfer", "fscore")


@dataclass(frozen=True)
class GenerateOptions:
    """The flags of generate, each short for a key."""

    method: Annotated[str | None, Option(help="how to distil; its recipe comes with it")] = None
    seed: Annotated[int | None, Option(help="of every random draw")] = None
    teacher: Annotated[str | None, Option(help="a packaged teacher (small), or a file of weights")] = None
    teacher_views: Annotated[str | None, Option(help="camera (exact) or words (front, side, back view)")] = None
    backend: Annotated[str | None, Option(help="kernels: auto, numba, torch ... (see sds3d doctor)")] = None
    out: Annotated[str | None, Option("--out", "-o", help="folder for run folders")] = None
    config: Annotated[Path | None, Option(help="a YAML file of settings, such as another run's config.yaml")] = None
    dry_run: Annotated[bool, Option("--dry-run", help="print the settings and stop")] = False
    quiet: Quiet = False
    json: Json = False

    def layer(self) -> dict[str, Any]:
        """The settings given by flags."""
        given = {key: getattr(self, key) for key in ("method", "seed", "backend", "out")}
        given |= {"teacher.name": self.teacher, "teacher.views": self.teacher_views}
        return {key: value for key, value in given.items() if value is not None}


@app.command()
@spread
def generate(
    prompt: Annotated[str, Argument(help='what to make, in quotes, as in "a red mug with a white handle"')],
    overrides: Overrides = None,
    options: GenerateOptions = GenerateOptions(),
) -> None:
    """Make a 3D asset from a prompt: mesh.glb, turntable.mp4, preview.png in a new folder under outputs/.

    [bold]Examples[/bold]

      sds3d generate "a red mug"

      sds3d generate "a blue chair" --method sds --seed 3 steps=800 render.resolution=64

      sds3d generate "a green cube on a yellow cylinder" --dry-run

    Ctrl-C stops after the current step and saves; [bold]sds3d resume[/bold] goes on. SDS3D_TRACEBACK=1 shows where an
    error came from.
    """
    from sds3d import config as configs

    begun = time.perf_counter()
    layers = options.layer(), configs.parse_overrides(overrides or [])
    config = configs.load(prompt, *layers, file=options.config)
    if options.dry_run:
        configs.make_teacher(config)
        configs.make_student(config)
        print(configs.to_yaml(config), end="")
        return
    from sds3d import asset as assets

    asset, steps = assets.start(config)
    _carry_out(asset, steps, begun, _display(options.quiet, options.json), options.json)


@app.command()
def resume(run: RunFolder, overrides: Overrides = None, quiet: Quiet = False, json: Json = False) -> None:
    """Go on with a run where it stopped, and finish it.

    [bold]Examples[/bold]

      sds3d resume outputs/00001-a-red-mug

      sds3d resume outputs/00001-a-red-mug steps=800      [dim]# longer than it was meant to be[/dim]

      sds3d resume outputs/00001-a-red-mug export.size=256      [dim]# a finished run: its files again[/dim]
    """
    from sds3d import asset as assets
    from sds3d import config as configs

    begun = time.perf_counter()
    asset, steps = assets.resume(run, configs.parse_overrides(overrides or []))
    _carry_out(asset, steps, begun, _display(quiet, json), json)


@app.command()
def export(
    run: RunFolder,
    format: Annotated[str, Option("--format", "-f", help="glb, obj, ply (mesh), mp4 (turntable), png (views)")] = "glb",
    out: Annotated[Path | None, Option("--out", "-o", help="folder to write to; the run's own by default")] = None,
    resolution: Annotated[int | None, Option(help="voxels along each side of the box")] = None,
    json: Json = False,
) -> None:
    """Write a run's asset in other formats.

    [bold]Example[/bold]

      sds3d export outputs/00001-a-red-mug --format glb,obj,ply --resolution 128
    """
    from dataclasses import replace

    from sds3d.asset import FORMATS, Asset

    names = {"mp4": "turntable", "png": "preview"}
    wanted = [part.strip().lower().lstrip(".") for part in format.split(",") if part.strip()]
    for suffix in wanted or [""]:
        if f".{suffix}" not in FORMATS:
            raise ValueError(f"format is {suffix!r}; give one or more of {', '.join(f[1:] for f in FORMATS)}")
    asset = Asset.open(run)
    if resolution is not None:
        settings = replace(asset.config.export, mesh_resolution=resolution)
        asset.config = replace(asset.config, export=settings)
    folder = out or asset.path
    files = [asset.export(folder / f"{names.get(suffix, 'mesh')}.{suffix}") for suffix in wanted]
    _print_result({"run": str(asset.path), "files": [str(f) for f in files]}, [str(f) for f in files], json)


@app.command(name="eval")
def evaluate(
    runs: Annotated[list[Path], Argument(metavar="RUN...", help="one run folder or more")],
    json: Json = False,
) -> None:
    """Compare runs with the true shapes of the toybox: IoU, PSNR, Chamfer, F-score; writes eval.png.

    [bold]Example[/bold]

      sds3d eval outputs/00001-a-red-mug
    """
    from sds3d.asset import Asset

    rows = []
    for run in runs:
        asset = Asset.open(run)
        scores = asset.evaluate().numbers()
        rows.append({"run": str(asset.path), "prompt": asset.config.prompt, **scores})
        if not json:
            print(_score_line(asset.config.prompt, scores))
    if json:
        print(_dump(rows if len(rows) > 1 else rows[0]))
        return
    if len(rows) > 1:
        figures = [[row[key] for row in rows if row[key] is not None] for key in SCORES]
        means = [sum(values) / len(values) if values else None for values in figures]
        print(_score_line(f"mean of {len(rows)}", dict(zip(SCORES, means, strict=True))))


def _score_line(name: str, scores: dict[str, Any]) -> str:
    chamfer = "no mesh" if scores["chamfer"] is None else f"{scores['chamfer']:.4f}"
    figures = f"IoU {scores['iou']:.3f}  PSNR {scores['psnr']:.2f} dB  Chamfer {chamfer}  F {scores['fscore']:.3f}"
    return f"{name:40s}  {figures}"


@app.command()
def methods(json: Json = False) -> None:
    """List the distillation methods, what each needs, its settings and its paper.

    [bold]Example[/bold]

      sds3d methods
    """
    from dataclasses import fields

    from sds3d.distill import METHODS
    from sds3d.typed import plain

    rows = []
    for name, kind in METHODS.items():
        text, _, paper = (kind.__doc__ or "").partition("\n")[0].partition("arXiv ")
        settings = {f"method.{f.name}": plain(getattr(kind(), f.name)) for f in fields(kind)}
        title, paper = text.rpartition(" (")[0], paper.partition(",")[0].rstrip("):. ")
        rows.append({"name": name, "title": title, "paper": paper, "needs": list(kind.NEEDS), "settings": settings})
    if json:
        print(_dump(rows))
        return
    for row in rows:
        needs = f"; needs a {', '.join(row['needs'])}" if row["needs"] else ""
        settings = " ".join(f"{key}={value}" for key, value in row["settings"].items())
        print(f"{row['name']:8s}{row['title']} (arXiv {row['paper']}){needs}\n        {settings}")


@app.command()
def doctor(json: Json = False) -> None:
    """Versions, device, the kernels chosen and why, and what is missing.

    [bold]Example[/bold]

      sds3d doctor --json
    """
    from sds3d import doctor as doctors

    report = doctors.examine()
    print(_dump(report) if json else doctors.to_text(report))


Teacher = Annotated[str, Option(help="a packaged teacher (small) or a file of weights")]


@teacher_app.command()
def sample(
    prompt: Annotated[str, Argument(help='a caption; view words count, as in "a red mug, side view"')],
    number: Annotated[int, Option("-n", "--number", min=1, max=256, help="how many images")] = 8,
    out: Annotated[Path, Option("--out", "-o", help="a .png or .jpg")] = Path("grid.png"),
    orbit: Annotated[bool, Option("--orbit", help="give the exact cameras of one turn around the object")] = False,
    seed: Annotated[int, Option(help="of the noise")] = 0,
    guidance: Annotated[float, Option(help="scale s of eps_uncond + s (eps_cond - eps_uncond)")] = 3.0,
    teacher: Teacher = "small",
) -> None:
    """Draw images with the teacher itself: what it can and cannot draw is what an asset can be.

    [bold]Examples[/bold]

      sds3d teacher sample "a red mug, side view" -n 8 -o grid.png

      sds3d teacher sample "a red mug" --orbit
    """
    from sds3d import cameras, config
    from sds3d.export import sheet
    from sds3d.teachers import fit

    judge = config.load_teacher(config.TeacherConfig(teacher))
    judge.check(prompt)
    turn = cameras.orbit(number) if orbit else None
    images = fit.sample(judge, prompt, number, seed, guidance, cameras=turn)
    print(sheet.contact_sheet(list(images.split(8)), out))


@teacher_app.command()
def words(teacher: Teacher = "small") -> None:
    """List the words the teacher knows.

    [bold]Example[/bold]

      sds3d teacher words
    """
    from sds3d import config

    print(" ".join(config.load_teacher(config.TeacherConfig(teacher)).vocabulary))


@teacher_app.command(name="train")
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
    from sds3d.config import parse_overrides, pick_device
    from sds3d.data import renders
    from sds3d.progress import Clock
    from sds3d.teachers import fit
    from sds3d.typed import build, merge

    given = parse_overrides(overrides or [])
    settings = build(fit.FitConfig, merge(fit.settings_of(out), given) if resume else given)
    clock, row, last = Clock(), None, 0
    rows = fit.train(out, settings, resume, pick_device(device))
    with _interruption() as stopped:
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


def _display(quiet: bool, as_json: bool) -> Silent:
    from sds3d import progress

    return progress.choose(quiet or as_json)


def _carry_out(asset: Asset, steps: Iterator[Step], begun: float, display: Silent, as_json: bool) -> None:
    """Run the loop to its end or to Ctrl-C, write the files, say where they are and what to do next."""
    last = None
    with display:
        config, backend = asset.config, asset.student.field.backend
        teacher = f"teacher {config.teacher.name} ({config.teacher.views})"
        display.note(f"{asset.path}  {asset.student.device}, {backend}, {teacher}")
        with _interruption() as stopped:
            for last in steps:
                display.show(last)
                if stopped:
                    break
        steps.close()
        if last is None:
            display.note(f"all {config.steps} steps were done before; writing the files")
        unfinished = last is not None and last.step < last.total
        if not unfinished:
            files = []
            for file in asset.finish():
                files.append(str(file))
                display.note(f"wrote {file}")
    seconds = time.perf_counter() - begun
    if unfinished:
        print(f"stopped after step {last.step} of {last.total}; go on with: sds3d resume {asset.path}", file=sys.stderr)
        raise typer.Exit(130)
    result = {"run": str(asset.path), "files": files, "steps": config.steps, "seconds": round(seconds, 2)}
    hints = [f"sds3d export {asset.path} --format glb,obj,ply", f"sds3d resume {asset.path} steps={2 * config.steps}"]
    display.note(f"done in {seconds:.0f} s; next:\n  " + "\n  ".join(hints))
    _print_result(result, files, as_json)


@contextmanager
def _interruption() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C (or SIGTERM) comes; a second one ends the program as usual."""
    caught: list[int] = []
    wanted = (signal.SIGINT, signal.SIGTERM)

    def note(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    before = {s: signal.signal(s, note) for s in wanted}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_result(result: dict[str, Any], lines: list[str], as_json: bool) -> None:
    print(_dump(result) if as_json else "\n".join(lines))


def _dump(value: Any) -> str:
    return json.dumps(value)


def main(arguments: list[str] | None = None) -> NoReturn:
    """The entry point of ``sds3d``. Ends the process with its exit code."""
    try:
        app(args=arguments)
    except ValueError as error:
        _complain(error, 2)
    except (ArithmeticError, RuntimeError) as error:
        from sds3d.distill.core import NonFiniteGradient
        from sds3d.train import Diverged

        if not isinstance(error, Diverged | NonFiniteGradient):
            raise
        _complain(error, 1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _complain(error: Exception, code: int) -> NoReturn:
    """One line on stderr; the whole story where SDS3D_TRACEBACK is set."""
    if os.environ.get("SDS3D_TRACEBACK"):
        raise error
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)
