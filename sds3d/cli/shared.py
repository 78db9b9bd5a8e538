"""What the commands share: their common options, Ctrl-C, and how results are printed."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

if TYPE_CHECKING:
    from sds3d.progress import Silent

Overrides = Annotated[
    list[str] | None, Argument(metavar="[KEY=VALUE]...", help="settings, as in steps=800 render.resolution=64")
]
RunFolder = Annotated[Path, Argument(metavar="RUN", help="a run folder, as in outputs/00001-a-red-mug")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="no progress; print the results only")]
Json = Annotated[bool, Option("--json", help="no progress; print one JSON object")]

Teacher = Annotated[str, Option(help="a packaged teacher (small) or a file of weights")]


def make_display(quiet: bool, as_json: bool) -> Silent:
    """What this terminal can show."""
    from sds3d import progress

    return progress.choose(quiet or as_json)


@contextmanager
def interruption() -> Iterator[list[int]]:
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


def print_result(result: dict[str, Any], lines: list[str], as_json: bool) -> None:
    print(dump(result) if as_json else "\n".join(lines))


def dump(value: Any) -> str:
    return json.dumps(value)
