"""Code shared by the commands: common options, the handling of Ctrl-C, and the printing of results."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from sds3d.runtime import files

if TYPE_CHECKING:
    from sds3d.config.load import RunConfig
    from sds3d.live.watch import Watch
    from sds3d.runs.generator import Generated
    from sds3d.runs.image import Painting
    from sds3d.runs.progress import Silent
    from sds3d.runs.scene import Asset
    from sds3d.train import Step

Overrides = Annotated[
    list[str] | None, Argument(metavar="[KEY=VALUE]...", help="settings, as in steps=800 render.resolution=64")
]


def user_path(text: str | Path) -> Path:
    """Parse a path and expand ~. Raises BadParameter if the text cannot be a path."""
    if not str(text):
        raise typer.BadParameter("it is empty; give a path, such as . for the folder you are in")
    try:
        return files.user_path(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def finite(value: float | None) -> float | None:
    """Check a number from a flag. Raises BadParameter for nan and infinity, which range checks may let through."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not finite; give a number")
    return value


def _silence_warnings(value: bool) -> bool:
    """Turn warnings off if --quiet or --json is given."""
    if value:
        warnings.simplefilter("ignore")
    return value


RunFolder = Annotated[
    Path, Argument(metavar="RUN", help="a run folder, as in outputs/00001-a-red-mug", parser=user_path)
]
Quiet = Annotated[bool, Option("--quiet", "-q", callback=_silence_warnings, help="no progress; print the results only")]
Json = Annotated[bool, Option("--json", callback=_silence_warnings, help="no progress; print one JSON object")]

TEACHERS = (
    "a packaged teacher (small or toybox, surface, digits), a file of weights, the folder of a training, or a "
    "diffusers pipeline (its folder, or its id on the hub)"
)
Teacher = Annotated[str, Option(help=TEACHERS)]
DType = Annotated[str, Option(help="dtype of the network: auto, float32, bfloat16, or for a pipeline float16")]
AllowPickle = Annotated[
    bool, Option("--allow-pickle", help="load a pipeline's .bin weights, which can run any program")
]


@dataclass(frozen=True)
class RunOptions:
    """The flags of every command that starts a run, each a shorthand for a setting."""

    method: Annotated[str | None, Option(help="how to distil; sds3d methods lists them")] = None
    negative: Annotated[str | None, Option(help="what not to make, as in 'blurry, ugly'")] = None
    seed: Annotated[int | None, Option(help="seed of every random draw")] = None
    teacher: Annotated[str | None, Option(help=TEACHERS)] = None
    allow_pickle: AllowPickle = False
    device: Annotated[str | None, Option(help="auto, cpu or cuda")] = None
    out: Annotated[str | None, Option("--out", "-o", help="folder for run folders")] = None
    config: Annotated[
        Path | None,
        Option(
            help="a YAML file of settings, as another run's config.yaml; or a model's recipe: if, sd3", parser=user_path
        ),
    ] = None
    dry_run: Annotated[bool, Option("--dry-run", help="print the settings and stop")] = False
    quiet: Quiet = False
    json: Json = False

    def own(self) -> dict[str, Any]:
        """Return the settings of the command's further flags by key; None for a flag that is not given."""
        return {}

    def watched(self) -> AbstractContextManager[Watch | None]:
        """Return a context with the live page of the run; None if the command has none or it is off."""
        return nullcontext()

    def layer(self) -> dict[str, Any]:
        """Return the settings that are given by flags."""
        flags = {"method": self.method, "seed": self.seed, "teacher.name": self.teacher, "out": self.out}
        flags |= {
            "negative": self.negative,
            "device": self.device,
            "teacher.hf.allow_pickle": self.allow_pickle or None,
        }
        return {key: value for key, value in (flags | self.own()).items() if value is not None}


def begin(
    context: typer.Context,
    prompt: str | None,
    overrides: list[str] | None,
    options: RunOptions,
    kind: type[RunConfig],
) -> None:
    """Start a new run and train it to its end; with --dry-run, only print its settings.

    Args:
        context: its ``obj`` is the teacher if that is an object, else None; see `sds3d.cli.main`.
    """
    from sds3d.config import load as configs
    from sds3d.runs import build, launch
    from sds3d.runtime import distributed

    begun = time.perf_counter()
    quiet = options.quiet or distributed.join().rank > 0  # one process prints for all
    layers = options.layer(), configs.parse_overrides(overrides or [])
    configs.refuse_twice({**layers[0], **({} if prompt is None else {"prompt": prompt})}, layers[1])
    config = configs.load(prompt, *layers, file=options.config, kind=kind)
    if context.obj is not None:
        build.refuse_settings_of_teacher(*layers)
        config = build.with_teacher(config, context.obj)
    if options.dry_run:
        launch.check(config, context.obj)
        print(dump(configs.to_plain(config)) if options.json else configs.to_yaml(config).rstrip("\n"))
        return
    for count in launch.prepare(config):
        if not (quiet or options.json):
            print(
                f"pairs of noise and the teacher's image: {count} of {config.pairs.count}", file=sys.stderr, flush=True
            )
    with options.watched() as watch:
        result, steps = launch.start(config, context.obj)
        carry_out(result, steps, begun, make_display(quiet, options.json), options.json, watch)


def make_display(quiet: bool, as_json: bool) -> Silent:
    """Return the progress display for this terminal."""
    from sds3d.runs import progress

    return progress.choose(quiet or as_json)


def carry_out(
    result: Asset | Painting | Generated,
    steps: Generator[Step],
    begun: float,
    display: Silent,
    as_json: bool,
    watch: Watch | None = None,
) -> None:
    """Run the loop to its end or to Ctrl-C, then write the files and print their paths and further commands.

    A viewer of the live page may also stop the loop; the files are then written, too.

    Args:
        result: the result that the loop trains.
        begun: time.perf_counter() at the start of the command.
        as_json: print the result as JSON.
        watch: the live page, if there is one.
    """
    from sds3d.runtime.distributed import join

    last, processes = None, join()
    with display:
        config = result.config
        teacher = f"teacher {config.teacher.name} ({config.teacher.views})"
        display.note(f"{result.path}  {result.kernels}, {teacher}")
        if watch is not None:
            scene: Any = result  # only scenes have a live page
            watch.begin(scene)
        with interruption() as stopped:
            for last in steps:
                display.show(last)
                if watch is not None:
                    watch.update(last, lambda: bool(stopped))
                # All processes must stop at the same step, or one would wait for the others for ever.
                if processes.any_process(bool(stopped) or (watch is not None and watch.stopped)):
                    break
        steps.close()
        if last is None:
            display.note(f"all {config.steps} steps were done before; writing the files")
        done = config.steps if last is None else last.step
        early = last is not None and last.step < last.total
        unfinished = early and not (watch is not None and watch.stopped)
        if not unfinished:
            if watch is not None:
                watch.export()
            files = _write_files(result, display)
    seconds = time.perf_counter() - begun
    if unfinished and processes.rank:
        raise typer.Exit(130)
    if unfinished:
        print(f"stopped after step {done} of {config.steps}; go on with: sds3d resume {result.path}", file=sys.stderr)
        raise typer.Exit(130)
    if not files:  # the process of rank 0 writes them
        return
    done = done if early else config.steps
    summary = {"run": str(result.path), "files": files, "steps": done, "seconds": round(seconds, 2)}
    display.note(f"done in {seconds:.0f} s; next:\n  " + "\n  ".join(_hints(result, files, early)))
    print_result(summary, files, as_json)
    if watch is not None:
        watch.finish([Path(file) for file in files], last)


def _write_files(result: Asset | Painting | Generated, display: Silent) -> list[str]:
    """Write a run's files. Returns their paths."""
    files = []
    try:
        for file in result.finish():
            files.append(str(file))
            display.note(f"wrote {file}")
    except KeyboardInterrupt:
        print(f"stopped while files were written; write them with: sds3d resume {result.path}", file=sys.stderr)
        raise typer.Exit(130) from None
    return files


def _hints(result: Asset | Painting | Generated, files: list[str], early: bool) -> list[str]:
    """Commands to suggest after a run that has written these files; ``early`` means that it has steps left."""
    if any(file.endswith("generator.safetensors") for file in files):
        return [f"sds3d sample {result.path}", f"sds3d eval {result.path}"]
    if any(file.endswith("pipeline") for file in files):
        return [f"sds3d sample {result.path}"]
    hints = [f"sds3d resume {result.path}" + ("" if early else f" steps={2 * result.config.steps}")]
    if any(file.endswith(".glb") for file in files):
        hints.insert(0, f"sds3d export {result.path} --format glb,obj,ply,stl")
    return hints


@contextmanager
def interruption(busy: Callable[[], bool] = lambda: True) -> Iterator[list[int]]:
    """A context that catches Ctrl-C and SIGTERM, once; a second signal ends the program as usual.

    Args:
        busy: returns whether a step is running. If so, the first signal prints that the program stops after it.

    Yields:
        A list that is empty until the first signal.
    """
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)

    def note(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        if busy():
            print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    before = {s: signal.signal(s, note) for s in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_result(result: dict[str, Any], lines: list[str], as_json: bool) -> None:
    """Print lines, or the result as JSON instead."""
    print(dump(result) if as_json else "\n".join(lines))


def dump(value: Any) -> str:
    """Format a value as one line of JSON."""
    return json.dumps(value)
