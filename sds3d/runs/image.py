"""A painting: images that a run optimised directly, without a scene."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from sds3d.config.load import PaintConfig
from sds3d.media import sheet
from sds3d.runs import report
from sds3d.runs.folder import Run, save_png
from sds3d.students.base import outsized
from sds3d.students.image import ImageStudent

COLUMNS = 8  # of image.png


class Painting:
    """The images of a run folder.

    Attributes:
        path (Path): the run folder.
        config (PaintConfig): everything that made them.
        student (ImageStudent): their pixels.
    """

    def __init__(self, run: Run, config: PaintConfig, student: ImageStudent):
        self.run, self.config, self.student = run, config, student

    @property
    def path(self) -> Path:
        return self.run.path

    @property
    def kernels(self) -> str:
        """Where the pixels are."""
        return str(self.student.device)

    @property
    def images(self) -> Tensor:
        """(N, 3, H, W) in [0, 1]."""
        return self.student.images()

    def picture(self) -> Tensor:
        """The first images, for a progress picture."""
        return self.images[:COLUMNS]

    def finish(self) -> Iterator[Path]:
        """Write image.png, all images side by side, images/1.png ... and index.html, one after the other;
        progress/strip.png is there already.

        Raises:
            ValueError: the disk is full.
        """
        if doubt := outsized(self.student):
            warnings.warn(f"{self.path}: {doubt}", stacklevel=2)
        with self.run.lock():
            images, folder = self.images.cpu(), self.run.folder("images")
            yield sheet.contact_sheet(list(images.split(COLUMNS)), self.path / "image.png")
            for i, image in enumerate(images, start=1):
                save_png(folder / f"{i}.png", image)
            yield folder
            strip = self.path / "progress" / "strip.png"
            if strip.is_file():
                yield strip
            yield report.write_page(self.run, doubt)
