"""The part of the page about one run: prompt, progress, buttons to pause, stop and export, and the finished mesh."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sds3d.config import load as configs
from sds3d.live.stage import icon, text
from sds3d.runs.progress import Clock, figures

if TYPE_CHECKING:
    from sds3d.live.stage import Stage
    from sds3d.runs.scene import Asset
    from sds3d.train import Step

INTERVAL = 0.25  # seconds between two updates of the figures


class Watch:
    """The part of the panel about one run. `begin` shows another run.

    Args:
        stage: the page.

    Attributes:
        stopped: whether a viewer clicked "Stop and export".
        pinned: whether the canvas keeps showing something else than this run.
    """

    def __init__(self, stage: Stage):
        self.stage, gui = stage, stage.gui
        self.asset: Asset | None = None
        self.stopped = self.pinned = self._paused = False
        self._updated, self._clock, self._meshes = 0.0, Clock(), list[Path]()
        self._prompt, self._details = gui.add_html(""), gui.add_html("")
        self._bar = gui.add_progress_bar(0.0, visible=False)
        self._status = gui.add_html("")
        self._pause = gui.add_button("Pause", icon=icon("player-pause"), visible=False)
        self._stop = gui.add_button("Stop and export", icon=icon("player-stop"), color="gray", visible=False)
        self._particle = gui.add_dropdown("scene", _numbers(1), visible=False)
        self._show = gui.add_button_group("show", ("mesh", "rendered scene"), visible=False)
        self._download = gui.add_button("Download GLB", icon=icon("download"), visible=False)
        self._pause.on_click(lambda event: self._toggle())
        self._stop.on_click(lambda event: self._stop_run())
        self._particle.on_update(lambda event: stage.run_soon(self._choose))
        self._show.on_click(lambda event: stage.run_soon(self._choose))
        self._download.on_click(lambda event: stage.send_file(event, self._meshes[self._index(self._meshes)]))

    def begin(self, asset: Asset) -> None:
        """Show another run, whose training begins."""
        self.asset, self.stopped, self._paused = asset, False, False
        self._clock, self._meshes = Clock(), []
        self._describe()
        self._bar.value, self._bar.visible = 0.0, True
        self._status.content = text("starting", muted=True)
        self._pause.label, self._pause.visible, self._stop.visible = "Pause", True, True
        self._show.visible = self._download.visible = False
        self.show()
        self.stage.update(asset, training=True)

    def update(self, step: Step, interrupted: Callable[[], bool]) -> None:
        """Update the page after a step, and wait while the run is paused.

        Args:
            interrupted: returns whether Ctrl-C was pressed.
        """
        self.stage.update(self.asset, training=True)
        if len(self.stage.viewers) and time.perf_counter() > self._updated + INTERVAL:
            self._show_figures(step)
        if not self._paused:
            return
        self._show_figures(step)
        while self._paused and not self.stopped and not interrupted():
            self.stage.update(self.asset, training=False)
            self.stage.wait(0.1)
        self.stage.viewers.invalidate()

    def export(self) -> None:
        """Show that training is over and files are being written."""
        self._pause.visible = self._stop.visible = False
        self._status.content = text("writing the files", muted=True)

    def finish(self, files: Sequence[Path], step: Step | None) -> None:
        """Show the finished run, with its mesh if there is one."""
        self._pause.visible = self._stop.visible = self._bar.visible = False
        self._meshes = [path for path in files if path.suffix == ".glb"]
        state = "finished" if step is None or step.step == step.total else f"stopped after step {step.step}"
        self._status.content = text(state) + text(*(str(path) for path in files), muted=True)
        self._show.visible = self._download.visible = bool(self._meshes)
        self.show()

    def fail(self, message: str) -> None:
        """Show an error message."""
        self._pause.visible = self._stop.visible = self._bar.visible = False
        self._status.content = text(message)

    def open(self, asset: Asset) -> None:
        """Show a run that is not training: its meshes if it has any, else its scene."""
        self.asset = asset
        self._describe()
        meshes = (asset.run.own(particle.file("mesh.glb").name) for particle in asset.particles)
        self.finish([path for path in meshes if path is not None], None)

    def show(self) -> None:
        """Show the chosen scene or mesh on the canvas, unless it is pinned."""
        assert self.asset is not None, "there is a run by now"
        assets = self.asset.particles
        self.asset = assets[self._index(assets)]
        if self.pinned:
            return
        if not self._meshes or self._show.value != "mesh":
            self.stage.show_scene()
            return
        try:
            self.stage.show_mesh(self._meshes[self._index(self._meshes)])
        except ValueError as error:
            self._status.content = text(str(error))

    def serve(self, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Serve the page until ``interrupted`` returns True, or Ctrl-C raises KeyboardInterrupt."""
        while not interrupted():
            self.stage.update(self.asset, training=False)
            self.stage.wait(0.2)

    def _describe(self) -> None:
        """Show the prompt and the settings."""
        assert self.asset is not None, "there is a run by now"
        asset, config = self.asset, self.asset.config
        self._prompt.content = text(config.prompt, strong=True)
        settings = f"{configs.name_of(config.method)}, teacher {config.teacher.short_name}, seed {config.seed}"
        self._details.content = text(f"{asset.path.name}: {settings}", muted=True)
        count = len(asset.particles)
        self._particle.options = _numbers(count)
        self._particle.visible = count > 1

    def _show_figures(self, step: Step) -> None:
        """Update the progress bar and the figures."""
        self._updated = time.perf_counter()
        self._bar.value = 100 * step.step / step.total
        line = self._clock.line(step.step, step.total, step.seconds).replace("  ", ", ")
        line = f"paused after {line}" if self._paused else line
        self._status.content = text(line) + text(figures(step).replace("  ", ", "), muted=True)

    def _toggle(self) -> None:
        self._paused = not self._paused
        self._pause.label = "Resume" if self._paused else "Pause"
        self.stage.viewers.changed.set()

    def _stop_run(self) -> None:
        self.stopped = True
        self._status.content = text("stopping after this step", muted=True)
        self.stage.viewers.changed.set()

    def _choose(self) -> None:
        """Show what a viewer has chosen."""
        self.pinned = False
        self.show()

    def _index(self, items: Sequence) -> int:
        """The index of the chosen particle, limited to the number of items."""
        return min(int(self._particle.value) - 1, len(items) - 1)


def _numbers(count: int) -> tuple[str, ...]:
    """The names of particles, from "1"."""
    return tuple(str(i + 1) for i in range(count))
