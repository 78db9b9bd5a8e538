"""The studio: prompts go into a queue, one asset grows after the other, the finished ones are there to be downloaded.

Everything but the clicks happens on one thread, the one that trains: between two steps it looks new prompts over, and
brings the panel up to date.
"""

from __future__ import annotations

import base64
import html
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sds3d.config import load as configs
from sds3d.distill.score import METHODS
from sds3d.live.hints import TITLE, Hints, without_commands
from sds3d.live.jobs import Job, Queue
from sds3d.live.stage import PROBLEMS, icon, text
from sds3d.live.watch import Watch
from sds3d.runs import build, launch
from sds3d.runs.folder import Run, open_picture
from sds3d.runtime.ranges import STEPS
from sds3d.teachers.base import PACKAGED, Teacher, object_name

if TYPE_CHECKING:
    from sds3d.live.stage import Stage

WAITING = 30  # prompts in the queue, at most: each is looked over, and shown, again and again
MOST = 30  # earlier runs of the folder that are listed
NOT_FOR_SCENES = {"source", "pairs", "real"}  # what methods need that edit, or that train generators


@dataclass(frozen=True)
class Finished:
    """An asset that can be shown and downloaded."""

    mesh: Path
    prompt: str
    told: str

    @classmethod
    def of(cls, run: Path) -> Finished:
        """What a run folder tells. Raises ValueError where it does not."""
        config = configs.of_run(run / "config.yaml")
        rows = Run(run).rows()
        steps = rows[-1]["step"] if rows else config.steps
        told = f"{run.name}, {configs.name_of(config.method)}, seed {config.seed}, {steps} steps"
        return cls(run / "mesh.glb", config.prompt, told)


class Studio:
    """The panel of the studio, and the loop behind it.

    Args:
        stage: the page.
        base: settings that the panel begins with; its ``out`` is where runs go.
        layer: settings of every run, over the defaults and under those of the panel.
        teachers: to choose from, beside that of ``base`` and the packaged one.
        teacher: an object, which is the first to choose from, in place of the teacher of ``base``.
    """

    def __init__(
        self,
        stage: Stage,
        base: configs.Config,
        layer: Mapping[str, Any],
        teachers: Sequence[str] = (),
        teacher: Teacher | None = None,
    ):
        self.stage, self.queue, self._layer, self._teacher = stage, Queue(), layer, teacher
        base = build.with_teacher(base, teacher)
        self._rows: list[Any] = []  # of viser's elements
        self._version, self._count = 0, 0
        gui = stage.gui
        self._add_form(base, list(dict.fromkeys((base.teacher.name, "small", *teachers))))
        with gui.add_folder("Now"):
            self.watch = Watch(stage)
            self._empty = gui.add_html(text("nothing yet: type a prompt above", muted=True))
            self._back = gui.add_button("Back to this one", icon=icon("arrow-back"), color="gray", visible=False)
            self._back.on_click(lambda event: stage.ask(self._return))
        self._waiting = gui.add_folder("Queue", visible=False)
        self._shelf = gui.add_folder("Finished", visible=False)
        self._list_earlier(Path(base.out).expanduser())

    def serve(self, interrupted: Callable[[], bool]) -> Path | None:
        """Make what is asked for, until the terminal wants it to end; returns the run that was not finished, if any."""
        while not interrupted():
            self._attend()
            job = self.queue.first("waiting")
            if job is not None:
                left = self._make(job, interrupted)
                if left is not None:
                    return left
            else:
                self.stage.attend(self.watch.asset, growing=False)
                self.stage.wait(0.2)
        return None

    @property
    def is_busy(self) -> bool:
        """Whether something is being made."""
        return self.queue.first("running") is not None

    def _add_form(self, base: configs.Config, teachers: Sequence[str]) -> None:
        """Prompt and settings, and what happens when they are sent."""
        gui = self.stage.gui
        able = [name for name, method in METHODS.items() if not NOT_FOR_SCENES & set(method.NEEDS)]
        with gui.add_form("New asset") as form:
            self._prompt = gui.add_text("prompt", "", hint="what to make")
            examples = gui.add_html("")
            method = gui.add_dropdown("method", able, initial_value=configs.name_of(base.method))
            teacher = gui.add_dropdown("teacher", teachers, initial_value=base.teacher.name)
            # Floats: a page may send any number, and viser cannot pass a whole one beyond 64 bits on to other pages.
            steps = gui.add_number("steps", float(base.steps), min=1, max=STEPS, step=1)
            seed = gui.add_number("seed", float(base.seed), min=0, max=2**53, step=1)
            send = gui.add_button("Make it", icon=icon("sparkles"))
        with gui.add_folder(TITLE, expand_by_default=False) as folder:
            words = gui.add_html("")

        def hint(event: object = None) -> None:
            hints = Hints.of(teacher.value) if teacher.value in teachers else Hints()
            examples.content = text(f"for example: {'; '.join(hints.examples)}", muted=True)
            examples.visible, folder.visible = bool(hints.examples), bool(hints.words)
            words.content = "".join(text(f"{kind}: {told}", muted=True) for kind, told in hints.words.items())

        hint()
        teacher.on_update(hint)
        send.on_click(lambda event: form.submit())

        def add(event: object) -> None:
            if method.value not in able or teacher.value not in teachers:
                return  # no page of ours offers that
            wanted = self._prompt.value.strip()
            if not wanted:
                return
            settings = {"method": method.value, "teacher.name": teacher.value}
            settings |= {"steps": whole(steps.value), "seed": whole(seed.value)}
            if len(self.queue.jobs()) >= WAITING:
                examples.content = text(f"the queue takes {WAITING} prompts: wait, or remove one of them")
                examples.visible = True
                return
            self.queue.add(wanted, settings)
            self._prompt.value = ""
            self.stage.eyes.moved.set()

        form.on_submit(add)

    def _list_earlier(self, out: Path) -> None:
        """List what the folder of runs has already, and show the newest of it."""
        newest = None
        for run in earlier(out)[-MOST:]:
            try:
                newest = Finished.of(run)
            except PROBLEMS as error:  # of another version, edited, or damaged
                print(f"left out: {run}: {error}", file=sys.stderr)
                continue
            self._put_on_shelf(newest)
        if newest is not None:
            self._show(newest)
            self.watch.held = False  # it gives way to the first run

    def _attend(self) -> None:
        """Look new prompts over, and show the queue where it has changed."""
        version = self.queue.version
        if version == self._version:
            return
        self._version = version  # what comes meanwhile is for the next time
        while (job := self.queue.first("new")) is not None:
            try:
                config = self._config(job)
                given = self._given(config)
                if given is not None or config.teacher.name in PACKAGED:  # any other would have to be loaded, beside
                    build.build_teacher(config, given)  # the one that teaches now
                self.queue.move(job.number, "waiting")
            except PROBLEMS as error:  # of one prompt; the next may do better
                self._fail(job, error)
        for row in self._rows:
            row.remove()
        self._rows = []
        jobs = [job for job in self.queue.jobs() if job.state != "running"]
        self._waiting.visible = bool(jobs)
        with self._waiting:
            for job in jobs:
                self._add_row(job)

    def _add_row(self, job: Job) -> None:
        """A job that waits or has failed, with a button to take it away."""
        gui, told = self.stage.gui, job.settings
        waiting = (
            f"waiting: {told['method']}, teacher {told['teacher.name']}, {told['steps']} steps, seed {told['seed']}"
        )
        line = text(job.prompt, strong=True) + text(job.message or waiting, muted=True)
        colour = "#b42318" if job.message else "inherit"
        row = gui.add_html(f'<div style="color:{colour};padding-top:.4em">{line}</div>')
        button = gui.add_button_group("", ("Remove",))
        button.on_click(lambda event: self._remove(job.number))
        self._rows += [row, button]

    def _fail(self, job: Job, error: Exception) -> None:
        """Say in the queue why a job came to nothing; its prompt goes back where it can be mended, if there is room."""
        self.queue.move(job.number, "failed", without_commands(str(error)))
        self._prompt.value = self._prompt.value or job.prompt

    def _remove(self, number: int) -> None:
        self.queue.remove(number)
        self.stage.eyes.moved.set()

    def _config(self, job: Job) -> configs.Config:
        return configs.load(job.prompt, self._layer, job.settings, kind=configs.Config)

    def _given(self, config: configs.Config) -> Teacher | None:
        """The object, where it is the teacher that was chosen; None for one that is loaded by its name."""
        chosen = self._teacher is not None and config.teacher.name == object_name(self._teacher)
        return self._teacher if chosen else None

    def _make(self, job: Job, interrupted: Callable[[], bool]) -> Path | None:
        """Make one asset; returns its folder where the terminal ended it before. Its problems are shown on the page."""
        if not self.queue.move(job.number, "running"):
            return None
        self._attend()
        self._empty.visible, begun = False, False
        try:
            config = self._config(job)
            made, steps = launch.start(config, self._given(config))
            begun = True
            self.watch.begin(made)
            for last in steps:
                self.watch.attend(last, interrupted)
                self._attend()
                if self.watch.stopped or interrupted():
                    break
            steps.close()
            if interrupted() and last.step < last.total:
                return made.path
            self.watch.export()
            files = []
            for file in made.finish():
                files.append(file)
                self._attend()
            self.watch.finish(files, last)
            self.queue.done(job.number)
            self._put_on_shelf(Finished.of(made.path))
        except PROBLEMS as error:  # of one prompt; the next may do better
            if begun:
                self.watch.fail("it failed; the queue says why")
            self._empty.visible = self.watch.asset is None
            self._fail(job, error)
            self._attend()
        return None

    def _put_on_shelf(self, asset: Finished) -> None:
        """List a finished asset, above the earlier ones."""
        gui = self.stage.gui
        self._count += 1
        self._shelf.visible = True
        with self._shelf:
            gui.add_html(card(asset), order=-2 * self._count)
            buttons = gui.add_button_group("", ("Show", "Download GLB"), order=-2 * self._count + 1)

        def clicked(event: Any) -> None:
            if event.target.value == "Show":
                self.stage.ask(lambda: self._show(asset))
            else:
                self.stage.offer(event, asset.mesh)

        buttons.on_click(clicked)

    def _show(self, asset: Finished) -> None:
        """Put a finished asset's mesh on the canvas, and keep it there."""
        try:
            self.stage.show_mesh(asset.mesh)
        except ValueError as error:
            self.watch.fail(str(error))
            return
        self.watch.held = True
        self._back.visible = self.watch.asset is not None

    def _return(self) -> None:
        self.watch.held = self._back.visible = False
        self.watch.reveal()


def whole(number: float) -> int | float:
    """A page's number as a whole one where it is one; what else it may be, the config refuses by name."""
    return int(number) if abs(number) < 2**62 and number == int(number) else number


def earlier(out: Path) -> list[Path]:
    """Run folders with a mesh, oldest first."""
    runs = sorted(path.parent for path in out.glob("[0-9]*-*/mesh.glb") if (path.parent / "config.yaml").is_file())
    return [run for run in runs if Run(run).own("mesh.glb") is not None]


def card(asset: Finished) -> str:
    """Thumbnail, prompt and settings as HTML, everything from the user escaped."""
    picture = thumbnail(Run(asset.mesh.parent).own("preview.png"))
    image = f'<img alt="" src="{picture}" style="width:5em;height:5em;border-radius:.4em;flex:none">' if picture else ""
    words = f'<div style="font-weight:600">{html.escape(asset.prompt)}</div>'
    words += f'<div style="opacity:.65;font-size:.85em">{html.escape(asset.told)}</div>'
    style = "display:flex;gap:.8em;align-items:center;padding:.5em .6em;overflow-wrap:anywhere"
    return f'<div style="{style}">{image}<div>{words}</div></div>'


def thumbnail(preview: Path | None) -> str:
    """The front view of a preview, which is a row of square views, as a data URL; "" where there is none."""
    try:
        row = None if preview is None else open_picture(preview)
    except ValueError:
        row = None
    if row is None:
        return ""
    front, data = row.crop((0, 0, min(row.size), min(row.size))), io.BytesIO()
    front.resize((128, 128)).save(data, "png")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
