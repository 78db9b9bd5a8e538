"""Displays of a run's progress: a live one for terminals, plain lines for logs, or none.

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

THUMBNAIL = 16  # width of a view in characters; its height is half as many lines
LINES = 10  # most plain lines per run

T = TypeVar("T")


def figures(step: Step) -> str:
    """Format a step's main figures, as in "opacity 0.21  |g| 14.2"."""
    shown = {"opacity": "opacity", "g_norm": "|g|"}
    return "  ".join(f"{label} {step.metrics[key]:.3g}" for key, label in shown.items() if key in step.metrics)


class Clock:
    """Measures steps per second since the first step it was given, and estimates the time left."""

    def __init__(self):
        self._first: tuple[int, float] | None = None

    def rate(self, step: int, seconds: float) -> float:
        """Return steps per second; 0 while unknown.

        Args:
            step: number of steps done.
            seconds: time at that step, from any origin.
        """
        self._first = self._first or (step, seconds)
        took = seconds - self._first[1]
        return (step - self._first[0]) / took if took > 0 else 0.0

    def line(self, step: int, total: int, seconds: float) -> str:
        """Format the progress, as in "step 40/400  8.1 steps/s  44 s left"."""
        rate = self.rate(step, seconds)
        if not rate:
            return f"step {step}/{total}"
        return f"step {step}/{total}  {rate:.1f} steps/s  {(total - step) / rate:.0f} s left"


class Silent:
    """A display that shows nothing; the base of the others."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def show(self, step: Step) -> None:
        """Show a step."""
        pass

    def note(self, text: str) -> None:
        """Show a line of text."""
        pass


class Lines(Silent):
    """A display of at most ten plain lines per run, for logs and pipes."""

    def __enter__(self) -> Self:
        self._clock = Clock()
        return self

    def show(self, step: Step) -> None:
        """Print a line if this is one of the ten steps that are shown."""
        line = self._clock.line(step.step, step.total, step.seconds)
        if step.step % -(-step.total // LINES) == 0 or step.step == step.total:
            self.note(f"{line}  {figures(step)}")

    def note(self, text: str) -> None:
        """Print a line to stderr."""
        print(text, file=sys.stderr, flush=True)


class Live(Silent):
    """A progress bar with time left, steps per second and figures, below the newest views as coloured characters."""

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
        """Advance the bar and show the newest views."""
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
    """Yield the items, and show how many are done: a bar on a terminal, else ten plain lines.

    Args:
        total: the number of items.
        what: the label, as in "turntable.mp4".
        quiet: show nothing.
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
    """A context that shows the progress of named parts: a bar for each on a terminal, else a line for each.

    Yields:
        A function to call with a part's name and the fraction of it that is done, 0 to 1.
    """
    if quiet:
        yield lambda part, fraction: None
        return
    if not sys.stderr.isatty():
        begun: set[str] = set()

        def line(part: str, fraction: float) -> None:
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

        def bar(part: str, fraction: float) -> None:
            if part not in tasks:
                tasks[part] = bars.add_task(part, total=1.0)
            bars.update(tasks[part], completed=fraction)

        yield bar


def thumbnail(views: Tensor) -> Text:
    """Draw views (B, 3, H, W) in [0, 1] side by side. Each character is two pixels, one above the other."""
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
    """Return the display that suits this terminal."""
    if quiet:
        return Silent()
    return Live() if sys.stderr.isatty() else Lines()
