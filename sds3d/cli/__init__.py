"""The command line. Results go to stdout; progress, warnings and errors go to stderr.

Exit codes: 0 done; 2 user error (one line on stderr); 1 the run diverged or would not fit into memory; 130 stopped by
Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer import Option

from sds3d.cli import generators, live, methods, pictures, scenes
from sds3d.cli import teacher as teachers
from sds3d.cli.options import spread
from sds3d.cli.shared import Json, Overrides, dump, finite, user_path

if TYPE_CHECKING:
    from sds3d.teachers.base import Teacher

app = typer.Typer(
    name="sds3d",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help='Text to 3D by score distillation. Start with:  sds3d generate "a red mug"',
)


@dataclass(frozen=True)
class DoctorOptions:
    """The flags of doctor, each a shorthand for a setting of generate."""

    teacher: Annotated[str | None, Option(help="estimate the memory of a run with this teacher")] = None
    method: Annotated[str | None, Option(help="method of that run; sds3d methods lists them")] = None
    device: Annotated[str | None, Option(help="auto, cpu or cuda")] = None
    config: Annotated[
        Path | None, Option(help="a YAML file of settings, such as another run's config.yaml", parser=user_path)
    ] = None
    memory: Annotated[
        float | None, Option(min=0.001, max=1e6, callback=finite, help="estimate for a GPU of this many GB instead")
    ] = None
    json: Json = False


@spread
def doctor(overrides: Overrides = None, options: DoctorOptions = DoctorOptions()) -> None:
    """Report versions, the device, the chosen kernels and what is missing; with --teacher, the memory of a run.

    The memory is estimated part by part, without loading or downloading weights. The report says whether the run fits
    and, if not, which settings would make it fit, the most effective first. Exit code 1 means that it does not fit.

    [bold]Examples[/bold]

      sds3d doctor --json

      sds3d doctor --teacher FOLDER --method vsd render.views=2 --memory 12
    """
    from sds3d.cli import machine_report
    from sds3d.config import load as configs
    from sds3d.config.schema import Config
    from sds3d.runs import memory_estimate as estimate

    flags = {"teacher.name": options.teacher, "method": options.method, "device": options.device}
    layer = {key: value for key, value in flags.items() if value is not None}
    if not (layer or overrides or options.config or options.memory is not None):
        report = machine_report.examine()
        print(dump(report) if options.json else machine_report.to_text(report))
        return
    settings = configs.parse_overrides(overrides or [])
    configs.refuse_twice(layer, settings)
    prompt = None if "prompt" in settings else "a red mug"
    config = configs.load(prompt, layer, settings, file=options.config, kind=Config)
    report = machine_report.examine_memory(config, estimate.find_machine(config.device, options.memory))
    print(dump(report) if options.json else machine_report.memory_text(report))
    if not report["fits"]:
        raise typer.Exit(1)


for command in (scenes.generate, scenes.resume, scenes.export, methods.paint, methods.compare, methods.methods, doctor):
    app.command()(command)
for command in (generators.distill, generators.sample, live.view, live.studio):
    app.command()(command)
for command in (pictures.render, pictures.gallery):
    app.command()(command)
app.command(name="eval")(scenes.evaluate)
app.add_typer(teachers.app, name="teacher")


_UsageError: Any = typer.BadParameter.__bases__[0]  # click's UsageError, which typer does not export


def main(arguments: list[str] | None = None, teacher: Teacher | None = None) -> NoReturn:
    """Run the command line and exit the process with its exit code.

    Args:
        arguments: the words after ``sds3d``; by default those of the process.
        teacher: an object to use as the teacher of generate, paint, compare, resume and studio.
    """
    texts = sys.argv[1:] if arguments is None else arguments
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            for text in texts:
                text.encode()
            command = typer.main.get_command(app)
            with command.make_context("sds3d", list(texts), obj=teacher) as context:
                if teacher is not None:
                    _require_use_of_teacher(teacher, next(iter(texts), ""))
                command.invoke(context)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except _UsageError as error:
        if not texts or type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        command_path = error.ctx.command_path if error.ctx else "sds3d"
        _exit_with(ValueError(f"{error.format_message()} See: {command_path} --help"), 2)
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        part = error.object[max(error.start - 40, 0) : error.end + 40]
        _exit_with(ValueError(f"{part!r} is not UTF-8: rename the file, or write the text anew as UTF-8"), 2)
    except ValueError as error:
        _exit_with(error, 2)
    except BrokenPipeError:  # the reader of stdout, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _exit_with(error, 2, f"{error.strerror}: {error.filename!r}" if error.filename else str(error))
    except (ArithmeticError, RuntimeError) as error:
        from sds3d.distill.core import NonFiniteGradient
        from sds3d.train import Diverged

        if "DefaultCPUAllocator" not in str(error) and not isinstance(error, Diverged | NonFiniteGradient):
            raise
        _exit_with(error, 1)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the exit
        print("stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _require_use_of_teacher(teacher: Teacher, command: str) -> None:
    """Raise ValueError if a teacher object is none, or a command would load another teacher in its place."""
    from sds3d.teachers.base import require_teacher

    require_teacher(teacher)
    if command in ("teacher", "doctor"):
        raise ValueError(f"sds3d {command} loads a teacher by its name; call it without the teacher object")


def _warn(message: Warning | str, *_: object) -> None:
    """Print a warning as one line on stderr. With --quiet or --json, warnings are filtered before they get here."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _exit_with(error: Exception, code: int, text: str | None = None) -> NoReturn:
    """Print an error as one line on stderr and exit. If SDS3D_TRACEBACK is set, raise it instead."""
    if os.environ.get("SDS3D_TRACEBACK"):
        raise error
    line = " ".join((text or str(error)).split())
    if len(line) > 1000:
        line = f"{line[:700]} ... {line[-250:]}"
    print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
