"""The command line: parses, calls, prints. Results go to stdout, progress and complaints to stderr.

Exit codes: 0 done, 2 a mistake of the user's (one sentence on stderr), 1 the run diverged or would not fit, 130 stopped
by Ctrl-C.
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
    """The flags of doctor, each short for a key of generate."""

    teacher: Annotated[str | None, Option(help="say how much memory a run with it takes: see sds3d generate")] = None
    method: Annotated[str | None, Option(help="of that run; sds3d methods lists them")] = None
    device: Annotated[str | None, Option(help="auto, cpu or cuda")] = None
    config: Annotated[
        Path | None, Option(help="a YAML file of settings, such as another run's config.yaml", parser=user_path)
    ] = None
    memory: Annotated[
        float | None, Option(min=0.001, max=1e6, callback=finite, help="GB of a GPU that is not here, as 12")
    ] = None
    json: Json = False


@spread
def doctor(overrides: Overrides = None, options: DoctorOptions = DoctorOptions()) -> None:
    """Versions, device, the kernels chosen and why, and what is missing; with --teacher, the memory that a run takes.

    A teacher's memory is estimated by part before any of its weights is loaded or downloaded: yes or no, and which
    settings would make it fit, the most effective first. Exit code 1 is no.

    [bold]Examples[/bold]

      sds3d doctor --json

      sds3d doctor --teacher FOLDER --method vsd render.views=2 --memory 12
    """
    from sds3d.cli import machine_report
    from sds3d.config import load as configs
    from sds3d.config.schema import Config
    from sds3d.runs import memory_estimate as estimate

    given = {"teacher.name": options.teacher, "method": options.method, "device": options.device}
    layer = {key: value for key, value in given.items() if value is not None}
    if not (layer or overrides or options.config or options.memory is not None):
        report = machine_report.examine()
        print(dump(report) if options.json else machine_report.to_text(report))
        return
    more = configs.parse_overrides(overrides or [])
    configs.refuse_twice(layer, more)
    prompt = None if "prompt" in more else "a red mug"
    told = configs.load(prompt, layer, more, file=options.config, kind=Config)
    report = machine_report.examine_memory(told, estimate.place(told.device, options.memory))
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


_UsageError: Any = typer.BadParameter.__bases__[0]  # of the click that this typer carries


def main(arguments: list[str] | None = None, teacher: Teacher | None = None) -> NoReturn:
    """The entry point of ``sds3d``. Ends the process with its exit code.

    Args:
        arguments: as they are typed after ``sds3d``; those of the process by default.
        teacher: an object, which generate, paint, compare, resume and studio take for the teacher.
    """
    texts = sys.argv[1:] if arguments is None else arguments
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            for text in texts:
                text.encode()
            command = typer.main.get_command(app)
            with command.make_context("sds3d", list(texts), obj=teacher) as context:
                command.invoke(context)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except _UsageError as error:
        if not texts or type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        where = error.ctx.command_path if error.ctx else "sds3d"
        _complain(ValueError(f"{error.format_message()} See: {where} --help"), 2)
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
        part = error.object[max(error.start - 40, 0) : error.end + 40]
        _complain(ValueError(f"{part!r} is not UTF-8: rename the file, or write the text anew as UTF-8"), 2)
    except ValueError as error:
        _complain(error, 2)
    except BrokenPipeError:  # who reads the results has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _complain(error, 2, f"{error.strerror}: {error.filename!r}" if error.filename else str(error))
    except (ArithmeticError, RuntimeError) as error:
        from sds3d.distill.core import NonFiniteGradient
        from sds3d.train import Diverged

        if "DefaultCPUAllocator" not in str(error) and not isinstance(error, Diverged | NonFiniteGradient):
            raise
        _complain(error, 1)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end takes a moment, and is not to be disturbed
        print("stopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _warn(message: Warning | str, *_: object) -> None:
    """A warning as one sentence on stderr; --quiet and --json leave it out."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _complain(error: Exception, code: int, text: str | None = None) -> NoReturn:
    """One line on stderr; the whole story where SDS3D_TRACEBACK is set."""
    if os.environ.get("SDS3D_TRACEBACK"):
        raise error
    line = " ".join((text or str(error)).split())
    if len(line) > 1000:
        line = f"{line[:700]} ... {line[-250:]}"
    print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
