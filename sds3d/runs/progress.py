"""What a run shows while it goes on: a live display, plain lines where there is no terminal, or nothing.

Everything goes to stderr, so that stdout holds results only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

import torch.nn.functional as F
from torch import Tensor

from sds3d.train import Step

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import TaskID
    from rich.text import Text

THUMBNAIL = 16  # characters a view is wide; half as many lines
LINES = 10  # plain lines a run, at most

T = TypeVar("T")


def figures(step: Step) -> str:
    """The figures people follow, as in "opacity 0.21  |g| 14.2"."""
    shown = {"opacity": "opacity", "g_norm": "|g|"}
    return "  ".join(f"{label} {step.metrics[key]:.3g}" for key, label in shown.items() if key in step.metrics)


class Clock:
    """Steps a second and time left, since the first step it saw."""

    def __init__(self):
        self._first: tuple[int, float] | None = None

    def rate(self, step: int, seconds: float) -> float:
        """Steps a second, 0 while unknown."""
        self._first = self._first or (step, seconds)
        took = seconds - self._first[1]
        return (step - self._first[0]) / took if took > 0 else 0.0

    def line(self, step: int, total: int, seconds: float) -> str:
        """As in "step 40/400  8.1 steps/s  44 s left"."""
        rate = self.rate(step, seconds)
        if not rate:
            return f"step {step}/{total}"
        return f"step {step}/{total}  {rate:.1f} steps/s  {(total - step) / rate:.0f} s left"


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def show(self, step: Step) -> None:
        """Show a step."""
        pass

    def note(self, text: str) -> None:
        """Say a line."""
        pass


class Lines(Silent):
    """Ten plain lines a run, for logs and pipes."""

    def __enter__(self) -> Self:
        self._clock = Clock()
        return self

    def show(self, step: Step) -> None:
        """Print every so many steps, ten lines in all."""
        line = self._clock.line(step.step, step.total, step.seconds)
        if step.step % -(-step.total // LINES) == 0 or step.step == step.total:
            self.note(f"{line}  {figures(step)}")

    def note(self, text: str) -> None:
        """Print a line to stderr."""
        print(text, file=sys.stderr, flush=True)


class Live(Silent):
    """A bar with ETA, steps a second and figures, and the newest views in half blocks of colour."""

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.live import Live as RichLive
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
        )
        self._task: TaskID | None = None
        self._views: Text | None = None
        self._clock = Clock()
        self._live = RichLive(self._layout(), console=self._console, refresh_per_second=4, transient=False)
        self._live.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.__exit__(kind, error, trace)

    def show(self, step: Step) -> None:
        """Move the bar, and show the newest views."""
        if self._task is None:
            self._task = self._bar.add_task("", total=step.total, rate="", figures="")
        rate = f"{self._clock.rate(step.step, step.seconds):.1f} steps/s"
        self._bar.update(self._task, completed=step.step, rate=rate, figures=figures(step))
        if step.picture is not None:
            self._views = thumbnail(step.picture)
            self._live.update(self._layout())

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, markup=False)

    def _layout(self) -> RenderableType:
        from rich.console import Group

        return Group(self._bar) if self._views is None else Group(self._views, self._bar)


def counted(items: Iterable[T], total: int, what: str, quiet: bool) -> Iterator[T]:
    """The items as they come, with a bar and the time left on a terminal, or ten plain lines.

    Args:
        what: they are, as in "turntable.mp4".
    """
    if quiet:
        yield from items
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, what, total, console=Console(stderr=True))
    else:
        begun = time.perf_counter()
        for done, item in enumerate(items, start=1):
            yield item
            if done % -(-total // LINES) == 0 or done == total:
                left = (time.perf_counter() - begun) / done * (total - done)
                print(f"{what} {done}/{total}  {left:.0f} s left", file=sys.stderr, flush=True)


@contextmanager
def parts(quiet: bool) -> Iterator[Callable[[str, float], None]]:
    """A function that is told what is being done and which share of it is done: a bar a part, or a line a part where
    there is no terminal."""
    if quiet:
        yield lambda part, share: None
        return
    if not sys.stderr.isatty():
        begun: set[str] = set()

        def line(part: str, share: float) -> None:
            if part not in begun:
                print(f"{part} ...", file=sys.stderr, flush=True)
            begun.add(part)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def bar(part: str, share: float) -> None:
            if part not in tasks:
                tasks[part] = bars.add_task(part, total=1.0)
            bars.update(tasks[part], completed=share)

        yield bar


def thumbnail(views: Tensor) -> Text:
    """Views (B, 3, H, W) in [0, 1] side by side; a character is two pixels, one above the other."""
    from rich.text import Text

    small = F.interpolate(views.detach().float().cpu(), (THUMBNAIL, THUMBNAIL), mode="area")
    pixels = (small.clamp(0, 1) * 255).round().int().permute(2, 0, 3, 1).flatten(1, 2).tolist()  # rows of (r, g, b)
    text = Text()
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        for (r, g, b), (u, v, w) in zip(upper, lower, strict=True):
            text.append("▀", style=f"rgb({r},{g},{b}) on rgb({u},{v},{w})")
        text.append("\n")
    return text


def choose(quiet: bool) -> Silent:
    """The display for this terminal."""
    if quiet:
        return Silent()
    return Live() if sys.stderr.isatty() else Lines()
