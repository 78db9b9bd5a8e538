"""Commands that serve a page in the browser: the view of a finished run, and the studio."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from sds3d.cli.shared import Overrides, RunFolder, interruption
from sds3d.live.address import HERE

if TYPE_CHECKING:
    from sds3d.live.stage import Stage
    from sds3d.live.watch import Watch

Port = Annotated[int | None, Option(help="port of the page; by default the first free one from 8080 on")]
Host = Annotated[
    str,
    Option(
        help="address on which the page is served. Any other than a loopback address lets other machines in; their "
        "browsers must use an IP address, this machine's name, or the address given here"
    ),
]


def require_place(host: str, port: int | None) -> None:
    """Raise ValueError for a port out of range, or an empty host, which would mean all addresses."""
    if port is not None and not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}; give a number from 1 to 65535, or leave it out")
    if not host.strip():
        raise ValueError(f"--host is {host!r}; give an address of this machine, or leave it out for {HERE}")


@contextmanager
def staging(host: str, port: int | None, title: str) -> Iterator[Stage]:
    """A context in which a page is served; prints its address. Raises ValueError if it cannot be served."""
    from sds3d.live.address import Address
    from sds3d.live.stage import Stage

    require_place(host, port)
    stage = Stage(Address.find(host, port), title)
    try:
        if stage.address.warning:
            print(stage.address.warning, file=sys.stderr)
        print(f"open {stage.address.url} in a browser", file=sys.stderr, flush=True)
        yield stage
    finally:
        stage.close()


@contextmanager
def watching(host: str, port: int | None, stay: bool) -> Iterator[Watch]:
    """A context in which the page of one run is served; with ``stay``, it ends only at Ctrl-C."""
    from sds3d.live.watch import Watch

    with staging(host, port, "sds3d live") as stage:
        watch = Watch(stage)
        try:
            yield watch
        except typer.Exit:
            raise
        except (ValueError, ArithmeticError, RuntimeError) as error:
            watch.fail(str(error))
            raise
        if stay:
            print("the page stays until Ctrl-C", file=sys.stderr, flush=True)
            _until_interrupted(watch)


@dataclass(frozen=True)
class LiveOptions:
    """The flags of commands whose run can be watched on a live page."""

    live: Annotated[bool, Option("--live", help="serve a page on which the run can be watched, until Ctrl-C")] = False
    port: Port = None
    host: Host = HERE

    def require(self) -> None:
        """Raise ValueError if --port or --host is given without --live."""
        if not self.live and (self.port is not None or self.host != HERE):
            raise ValueError("--port and --host are for the page of --live; add --live")

    def page(self, silent: bool) -> AbstractContextManager[Watch | None]:
        """Return a context with the live page; None without --live. Raises ValueError; see `require`.

        Args:
            silent: end the page together with the run.
        """
        if self.live:
            return watching(self.host, self.port, stay=not silent)
        self.require()
        return nullcontext()


def view(run: RunFolder, port: Port = None, host: Host = HERE) -> None:
    """Look at a run in a browser: its mesh, and its scene rendered from your own camera. Ends with Ctrl-C.

    [bold]Example[/bold]

      sds3d view outputs/00001-a-red-mug
    """
    from sds3d.live.watch import Watch
    from sds3d.runs.scene import Asset

    asset = Asset.open(run)
    with staging(host, port, "sds3d view") as stage:
        watch = Watch(stage)
        watch.open(asset)
        _until_interrupted(watch)


def studio(
    context: typer.Context,
    overrides: Overrides = None,
    out: Annotated[str | None, Option("--out", "-o", help="folder for run folders")] = None,
    teacher: Annotated[list[str] | None, Option(help="one more teacher to choose from; may be repeated")] = None,
    port: Port = None,
    host: Host = HERE,
) -> None:
    """Make assets in a browser: a form for prompts, a queue, the asset in training, and finished assets to download.

    [bold]Examples[/bold]

      sds3d studio

      sds3d studio --out mugs steps=800 render.resolution=64      [dim]# settings of every asset made there[/dim]

    Ctrl-C saves the run in training and ends the studio.
    """
    from sds3d.config import load as configs
    from sds3d.live.studio import Studio
    from sds3d.runs.build import refuse_settings_of_teacher
    from sds3d.runtime.files import require_folder

    require_place(host, port)
    layer = configs.parse_overrides(overrides or [])
    if "prompt" in layer:
        raise ValueError("prompt= cannot be set in the studio, whose page takes the prompts: leave it out")
    if out is not None:
        configs.refuse_twice({"out": out}, layer)
        layer |= {"out": out}
    if context.obj is not None:
        refuse_settings_of_teacher(layer)
    base = configs.load("a red mug", layer, kind=configs.Config)  # checks the settings before the page is served
    require_folder(Path(base.out).expanduser())
    with staging(host, port, "sds3d studio") as stage:
        page = Studio(stage, base, layer, teacher or [], context.obj)
        with interruption(lambda: page.is_busy) as stopped:
            unfinished = page.serve(lambda: bool(stopped))
    if unfinished is not None:
        print(f"go on with: sds3d resume {unfinished}", file=sys.stderr)
        raise typer.Exit(130)


def _until_interrupted(watch: Watch) -> None:
    """Serve until Ctrl-C, which ends the command without an error."""
    try:
        watch.serve()
    except KeyboardInterrupt:
        print(file=sys.stderr)
