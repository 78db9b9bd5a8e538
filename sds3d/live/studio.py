"""The studio: a page with a queue of prompts, the asset in training, and finished assets to download.

Everything except clicks happens on the thread that trains. Between two steps it checks new prompts and updates the
panel.
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
from sds3d.live.jobs import Job, Queue
from sds3d.live.prompt_hints import TITLE, Hints, without_commands
from sds3d.live.stage import PROBLEMS, icon, text
from sds3d.live.watch import Watch
from sds3d.runs import build, launch
from sds3d.runs.folder import Run, open_picture
from sds3d.runtime.ranges import STEPS
from sds3d.teachers.base import PACKAGED, Teacher, TeacherConfig, object_name

if TYPE_CHECKING:
    from sds3d.live.stage import Stage

WAITING = 30  # most prompts in the queue, which is checked and shown again at every change
MOST = 30  # most earlier runs of the folder that are listed
NOT_FOR_SCENES = {"source", "pairs", "real"}  # needs of methods that edit or that train generators


@dataclass(frozen=True)
class Finished:
    """A finished asset, which can be shown and downloaded."""

    mesh: Path
    prompt: str
    details: str

    @classmethod
    def of(cls, run: Path) -> Finished:
        """Read a run folder. Raises ValueError if it cannot be read."""
        config = configs.of_run(run / "config.yaml")
        rows = Run(run).rows()
        steps = rows[-1]["step"] if rows else config.steps
        details = f"{run.name}, {configs.name_of(config.method)}, seed {config.seed}, {steps} steps"
        return cls(run / "mesh.glb", config.prompt, details)


class Studio:
    """The panel of the studio, and the loop that trains its assets.

    Args:
        stage: the page.
        base: the initial settings of the form; its ``out`` is the folder of the runs.
        layer: settings of every run; those of the form override them.
        teachers: further teachers to choose from, beside that of ``base`` and the packaged one.
        teacher: an object, which replaces the teacher of ``base``.
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
        self._rows: list[Any] = []  # viser's elements that show the queue
        self._version, self._count = 0, 0
        gui = stage.gui
        self._add_form(base, list(dict.fromkeys((base.teacher.name, "small", *teachers))))
        with gui.add_folder("Now"):
            self.watch = Watch(stage)
            self._empty = gui.add_html(text("nothing yet: type a prompt above", muted=True))
            self._back = gui.add_button("Back to this one", icon=icon("arrow-back"), color="gray", visible=False)
            self._back.on_click(lambda event: stage.run_soon(self._show_current))
        self._waiting = gui.add_folder("Queue", visible=False)
        self._finished = gui.add_folder("Finished", visible=False)
        self._list_earlier(Path(base.out).expanduser())

    def serve(self, interrupted: Callable[[], bool]) -> Path | None:
        """Train the assets of the queue until ``interrupted`` returns True. Returns the unfinished run, if any."""
        while not interrupted():
            self._update()
            job = self.queue.first("waiting")
            if job is not None:
                unfinished = self._make(job, interrupted)
                if unfinished is not None:
                    return unfinished
            else:
                self.stage.update(self.watch.asset, training=False)
                self.stage.wait(0.2)
        return None

    @property
    def is_busy(self) -> bool:
        """Whether an asset is being trained."""
        return self.queue.first("running") is not None

    def _add_form(self, base: configs.Config, teachers: Sequence[str]) -> None:
        """Add the form for prompt and settings, with its callbacks."""
        gui = self.stage.gui
        methods = [name for name, method in METHODS.items() if not NOT_FOR_SCENES & set(method.NEEDS)]
        with gui.add_form("New asset") as form:
            self._prompt = gui.add_text("prompt", "", hint="what to make")
            examples = gui.add_html("")
            method = gui.add_dropdown("method", methods, initial_value=configs.name_of(base.method))
            teacher = gui.add_dropdown("teacher", teachers, initial_value=base.teacher.name)
            # Floats, since a page may send any number, and viser cannot send integers beyond 64 bits to other pages.
            steps = gui.add_number("steps", float(base.steps), min=1, max=STEPS, step=1)
            seed = gui.add_number("seed", float(base.seed), min=0, max=2**53, step=1)
            send = gui.add_button("Make it", icon=icon("sparkles"))
        with gui.add_folder(TITLE, expand_by_default=False) as folder:
            words = gui.add_html("")

        def hint(event: object = None) -> None:
            hints = Hints.of(teacher.value) if teacher.value in teachers else Hints()
            examples.content = text(f"for example: {'; '.join(hints.examples)}", muted=True)
            examples.visible, folder.visible = bool(hints.examples), bool(hints.words)
            words.content = "".join(text(f"{group}: {listed}", muted=True) for group, listed in hints.words.items())

        hint()
        teacher.on_update(hint)
        send.on_click(lambda event: form.submit())

        def add(event: object) -> None:
            if method.value not in methods or teacher.value not in teachers:
                return  # the form does not offer it: the message was forged
            prompt = self._prompt.value.strip()
            if not prompt:
                return
            settings = {"method": method.value, "teacher.name": teacher.value}
            settings |= {"steps": whole(steps.value), "seed": whole(seed.value)}
            if len(self.queue.jobs()) >= WAITING:
                examples.content = text(f"the queue takes {WAITING} prompts: wait, or remove one of them")
                examples.visible = True
                return
            self.queue.add(prompt, settings)
            self._prompt.value = ""
            self.stage.viewers.changed.set()

        form.on_submit(add)

    def _list_earlier(self, out: Path) -> None:
        """List the assets that the folder of runs has already, and show the newest."""
        newest = None
        for run in earlier(out)[-MOST:]:
            try:
                newest = Finished.of(run)
            except PROBLEMS as error:  # written by another version, edited, or damaged
                print(f"left out: {run}: {error}", file=sys.stderr)
                continue
            self._list_finished(newest)
        if newest is not None:
            self._show(newest)
            self.watch.pinned = False  # the first run of the queue replaces it

    def _update(self) -> None:
        """Check new prompts, and show the queue if it has changed."""
        version = self.queue.version
        if version == self._version:
            return
        self._version = version  # later changes are shown in the next call
        while (job := self.queue.first("new")) is not None:
            try:
                config = self._config(job)
                teacher = self._teacher_object(config)
                if teacher is not None or config.teacher.name in PACKAGED:
                    build.build_teacher(config, teacher)  # others are large: not loaded beside the one in training
                self.queue.move(job.number, "waiting")
            except PROBLEMS as error:  # the error of one prompt; the studio goes on
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
        """Add the row of a job that waits or has failed, with a button to remove it."""
        gui, settings = self.stage.gui, job.settings
        waiting = f"waiting: {settings['method']}, teacher {TeacherConfig(settings['teacher.name']).short_name}, "
        waiting += f"{settings['steps']} steps, seed {settings['seed']}"
        line = text(job.prompt, strong=True) + text(job.message or waiting, muted=True)
        colour = "#b42318" if job.message else "inherit"
        row = gui.add_html(f'<div style="color:{colour};padding-top:.4em">{line}</div>')
        button = gui.add_button_group("", ("Remove",))
        button.on_click(lambda event: self._remove(job.number))
        self._rows += [row, button]

    def _fail(self, job: Job, error: Exception) -> None:
        """Show in the queue why a job failed. Its prompt goes back into the form if that is empty."""
        self.queue.move(job.number, "failed", without_commands(str(error)))
        self._prompt.value = self._prompt.value or job.prompt

    def _remove(self, number: int) -> None:
        self.queue.remove(number)
        self.stage.viewers.changed.set()

    def _config(self, job: Job) -> configs.Config:
        return configs.load(job.prompt, self._layer, job.settings, kind=configs.Config)

    def _teacher_object(self, config: configs.Config) -> Teacher | None:
        """The teacher object if the config names it; None for a teacher that is loaded by its name."""
        chosen = self._teacher is not None and config.teacher.name == object_name(self._teacher)
        return self._teacher if chosen else None

    def _make(self, job: Job, interrupted: Callable[[], bool]) -> Path | None:
        """Train one asset. Returns its folder if Ctrl-C stopped it before its end. Errors are shown on the page."""
        if not self.queue.move(job.number, "running"):
            return None
        self._update()
        self._empty.visible, begun = False, False
        try:
            config = self._config(job)
            result, steps = launch.start(config, self._teacher_object(config))
            begun = True
            self.watch.begin(result)
            for last in steps:
                self.watch.update(last, interrupted)
                self._update()
                if self.watch.stopped or interrupted():
                    break
            steps.close()
            if interrupted() and last.step < last.total:
                return result.path
            self.watch.export()
            files = []
            for file in result.finish():
                files.append(file)
                self._update()
            self.watch.finish(files, last)
            self.queue.done(job.number)
            self._list_finished(Finished.of(result.path))
        except PROBLEMS as error:  # the error of one prompt; the studio goes on
            if begun:
                self.watch.fail("it failed; the queue says why")
            self._empty.visible = self.watch.asset is None
            self._fail(job, error)
            self._update()
        return None

    def _list_finished(self, asset: Finished) -> None:
        """List a finished asset above the earlier ones."""
        gui = self.stage.gui
        self._count += 1
        self._finished.visible = True
        with self._finished:
            gui.add_html(card(asset), order=-2 * self._count)
            buttons = gui.add_button_group("", ("Show", "Download GLB"), order=-2 * self._count + 1)

        def clicked(event: Any) -> None:
            if event.target.value == "Show":
                self.stage.run_soon(lambda: self._show(asset))
            else:
                self.stage.send_file(event, asset.mesh)

        buttons.on_click(clicked)

    def _show(self, asset: Finished) -> None:
        """Show a finished asset's mesh on the canvas, and pin it."""
        try:
            self.stage.show_mesh(asset.mesh)
        except ValueError as error:
            self.watch.fail(str(error))
            return
        self.watch.pinned = True
        self._back.visible = self.watch.asset is not None

    def _show_current(self) -> None:
        self.watch.pinned = self._back.visible = False
        self.watch.show()


def whole(number: float) -> int | float:
    """Convert a number of the page to an integer if it is one. The config refuses other values by name."""
    return int(number) if abs(number) < 2**62 and number == int(number) else number


def earlier(out: Path) -> list[Path]:
    """Return run folders with a mesh, oldest first."""
    runs = sorted(path.parent for path in out.glob("[0-9]*-*/mesh.glb") if (path.parent / "config.yaml").is_file())
    return [run for run in runs if Run(run).own("mesh.glb") is not None]


def card(asset: Finished) -> str:
    """Format thumbnail, prompt and details as HTML, with the user's text escaped."""
    picture = thumbnail(Run(asset.mesh.parent).own("preview.png"))
    image = f'<img alt="" src="{picture}" style="width:5em;height:5em;border-radius:.4em;flex:none">' if picture else ""
    lines = f'<div style="font-weight:600">{html.escape(asset.prompt)}</div>'
    lines += f'<div style="opacity:.65;font-size:.85em">{html.escape(asset.details)}</div>'
    style = "display:flex;gap:.8em;align-items:center;padding:.5em .6em;overflow-wrap:anywhere"
    return f'<div style="{style}">{image}<div>{lines}</div></div>'


def thumbnail(preview: Path | None) -> str:
    """Return the front view of a preview, which is a row of square views, as a data URL; "" if there is none."""
    try:
        row = None if preview is None else open_picture(preview)
    except ValueError:
        row = None
    if row is None:
        return ""
    front, data = row.crop((0, 0, min(row.size), min(row.size))), io.BytesIO()
    front.resize((128, 128)).save(data, "png")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
