"""A run on the page: its prompt, how far it is, buttons to pause it and to stop and export it, and what it made."""

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

TELL = 0.25  # seconds between two updates of the figures


class Watch:
    """The part of the panel that is about one run; `begin` gives it another.

    Args:
        stage: the page.

    Attributes:
        stopped: whether somebody clicked "Stop and export".
        held: whether the canvas shows something else, and is to go on with that.
    """

    def __init__(self, stage: Stage):
        self.stage, gui = stage, stage.gui
        self.asset: Asset | None = None
        self.stopped = self.held = self._paused = False
        self._told, self._clock, self._meshes = 0.0, Clock(), list[Path]()
        self._prompt, self._details = gui.add_html(""), gui.add_html("")
        self._bar = gui.add_progress_bar(0.0, visible=False)
        self._status = gui.add_html("")
        self._pause = gui.add_button("Pause", icon=icon("player-pause"), visible=False)
        self._stop = gui.add_button("Stop and export", icon=icon("player-stop"), color="gray", visible=False)
        self._particle = gui.add_dropdown("scene", _numbers(1), visible=False)
        self._show = gui.add_button_group("show", ("mesh", "rendered scene"), visible=False)
        self._download = gui.add_button("Download GLB", icon=icon("download"), visible=False)
        self._pause.on_click(lambda event: self._toggle())
        self._stop.on_click(lambda event: self._end())
        self._particle.on_update(lambda event: stage.ask(self._choose))
        self._show.on_click(lambda event: stage.ask(self._choose))
        self._download.on_click(lambda event: stage.offer(event, self._meshes[self._index(self._meshes)]))

    def begin(self, asset: Asset) -> None:
        """Show another run, which trains from now on."""
        self.asset, self.stopped, self._paused = asset, False, False
        self._clock, self._meshes = Clock(), []
        self._describe()
        self._bar.value, self._bar.visible = 0.0, True
        self._status.content = text("starting", muted=True)
        self._pause.label, self._pause.visible, self._stop.visible = "Pause", True, True
        self._show.visible = self._download.visible = False
        self.reveal()
        self.stage.attend(asset, growing=True)

    def attend(self, step: Step, interrupted: Callable[[], bool]) -> None:
        """After every step: show what there is to see to those who look, and wait while the run is paused.

        Args:
            interrupted: whether the terminal wants it to end.
        """
        self.stage.attend(self.asset, growing=True)
        if len(self.stage.eyes) and time.perf_counter() > self._told + TELL:
            self._tell(step)
        if not self._paused:
            return
        self._tell(step)
        while self._paused and not self.stopped and not interrupted():
            self.stage.attend(self.asset, growing=False)
            self.stage.wait(0.1)
        self.stage.eyes.blur()

    def export(self) -> None:
        """Training is over; the files are being written."""
        self._pause.visible = self._stop.visible = False
        self._status.content = text("writing the files", muted=True)

    def finish(self, files: Sequence[Path], step: Step | None) -> None:
        """Show what the run made: its mesh, where there is one."""
        self._pause.visible = self._stop.visible = self._bar.visible = False
        self._meshes = [path for path in files if path.suffix == ".glb"]
        state = "finished" if step is None or step.step == step.total else f"stopped after step {step.step}"
        self._status.content = text(state) + text(*(str(path) for path in files), muted=True)
        self._show.visible = self._download.visible = bool(self._meshes)
        self.reveal()

    def fail(self, message: str) -> None:
        """Say why there is nothing to show."""
        self._pause.visible = self._stop.visible = self._bar.visible = False
        self._status.content = text(message)

    def open(self, asset: Asset) -> None:
        """Show a run that is not training: its meshes, if it has some, else its scene."""
        self.asset = asset
        self._describe()
        meshes = (asset.run.own(one.file("mesh.glb").name) for one in asset.particles)
        self.finish([path for path in meshes if path is not None], None)

    def reveal(self) -> None:
        """Show the scene or the mesh that is chosen, unless the canvas is held."""
        assert self.asset is not None, "there is a run by now"
        assets = self.asset.particles
        self.asset = assets[self._index(assets)]
        if self.held:
            return
        if not self._meshes or self._show.value != "mesh":
            self.stage.show_scene()
            return
        try:
            self.stage.show_mesh(self._meshes[self._index(self._meshes)])
        except ValueError as error:
            self._status.content = text(str(error))

    def stay(self, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Serve those who look, until the terminal wants it to end or Ctrl-C raises KeyboardInterrupt."""
        while not interrupted():
            self.stage.attend(self.asset, growing=False)
            self.stage.wait(0.2)

    def _describe(self) -> None:
        """The prompt and what else there is to say beforehand."""
        assert self.asset is not None, "there is a run by now"
        asset, config = self.asset, self.asset.config
        self._prompt.content = text(config.prompt, strong=True)
        told = f"{configs.name_of(config.method)}, teacher {Path(config.teacher.name).name}, seed {config.seed}"
        self._details.content = text(f"{asset.path.name}: {told}", muted=True)
        count = len(asset.particles)
        self._particle.options = _numbers(count)
        self._particle.visible = count > 1

    def _tell(self, step: Step) -> None:
        """Bring the figures up to date."""
        self._told = time.perf_counter()
        self._bar.value = 100 * step.step / step.total
        line, told = self._clock.line(step.step, step.total, step.seconds).replace("  ", ", "), figures(step)
        line = f"paused after {line}" if self._paused else line
        self._status.content = text(line) + text(told.replace("  ", ", "), muted=True)

    def _toggle(self) -> None:
        self._paused = not self._paused
        self._pause.label = "Resume" if self._paused else "Pause"
        self.stage.eyes.moved.set()

    def _end(self) -> None:
        self.stopped = True
        self._status.content = text("stopping after this step", muted=True)
        self.stage.eyes.moved.set()

    def _choose(self) -> None:
        """Show what was just clicked."""
        self.held = False
        self.reveal()

    def _index(self, several: Sequence) -> int:
        """Which of several is chosen."""
        return min(int(self._particle.value) - 1, len(several) - 1)


def _numbers(count: int) -> tuple[str, ...]:
    """What particles are called, from "1"."""
    return tuple(str(i + 1) for i in range(count))
