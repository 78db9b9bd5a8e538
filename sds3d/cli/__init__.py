"""The command line: parses, calls, prints. Results go to stdout, progress and complaints to stderr.

Exit codes: 0 done, 2 a mistake of the user's (one sentence on stderr), 1 the run diverged, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from sds3d.cli import generators, live, methods, pictures, scenes, teacher
from sds3d.cli.shared import Json, dump

app = typer.Typer(
    name="sds3d",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help='Text to 3D by score distillation. Start with:  sds3d generate "a red mug"',
)


def doctor(json: Json = False) -> None:
    """Versions, device, the kernels chosen and why, and what is missing.

    [bold]Example[/bold]

      sds3d doctor --json
    """
    from sds3d import doctor as doctors

    report = doctors.examine()
    print(dump(report) if json else doctors.to_text(report))


for command in (scenes.generate, scenes.resume, scenes.export, methods.paint, methods.compare, methods.methods, doctor):
    app.command()(command)
for command in (generators.distill, generators.sample, live.view, live.studio):
    app.command()(command)
for command in (pictures.render, pictures.gallery):
    app.command()(command)
app.command(name="eval")(scenes.evaluate)
app.add_typer(teacher.app, name="teacher")


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
