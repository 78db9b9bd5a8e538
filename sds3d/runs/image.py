"""A painting: images whose pixels a run has optimised, without a scene."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from sds3d.config import load as configs
from sds3d.config.schema import PaintConfig
from sds3d.media import sheet
from sds3d.runs import image_parts, report
from sds3d.runs.folder import Run, save_png
from sds3d.runtime.distributed import Processes
from sds3d.runtime.torch_modes import training
from sds3d.students.base import outsized
from sds3d.students.image import ImageStudent

COLUMNS = 8  # of image.png


class Painting:
    """The images of a run folder.

    Attributes:
        path (Path): the run folder.
        config (PaintConfig): the run's settings.
        student (ImageStudent): the pixels.
    """

    PAGE: ClassVar[report.PageFacts] = report.PageFacts(
        pictures={"Images": "image.png"}, commands=("sds3d resume {run} steps={twice}",)
    )

    def __init__(self, run: Run, config: PaintConfig, student: ImageStudent):
        self.run, self.config, self.student = run, config, student

    @classmethod
    @training()
    def open(cls, path: str | Path, device: str = "auto") -> Painting:
        """Load the images of a run folder from its last checkpoint.

        Raises:
            ValueError: the run or its checkpoint is missing or damaged, or the run is of another kind.
        """
        run = Run.open(path)
        config = configs.of_run(run.config)
        if config.MAKES != "images":
            raise ValueError(f"{run.path} makes a {config.MAKES}, not images")
        config = configs.changed(config, {"device": device})
        student = image_parts.build_student(config, None, Processes())
        run.load_student(student)
        return cls(run, config, student)

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.run.path

    @property
    def kernels(self) -> str:
        """The device of the pixels, for display."""
        return str(self.student.device)

    @property
    def images(self) -> Tensor:
        """The images, (N, 3, H, W) in [0, 1]."""
        return self.student.images()

    def pictures(self, count: int, resolution: int) -> Tensor:
        """Return all images, (N, 3, H, W) in [0, 1]. ``count`` and ``resolution`` are for scenes and have no effect."""
        return self.images

    def against_truth(self) -> dict[str, float | None]:
        """Compare with the toybox's object of the prompt. Raises ValueError if the prompt is not the toybox's.

        Returns:
            "psnr": the mean over the images of the PSNR in dB to the most similar true view.
        """
        from sds3d.data import toybox
        from sds3d.evaluate import truth

        images = self.images
        views, _ = toybox.parse(self.config.prompt).render(truth.unseen_views(), images.shape[-1])
        error = (images.cpu()[:, None] - views).square().flatten(2).mean(-1).amin(1)  # (N,)
        return {"psnr": float((-10 * error.clamp_min(1e-6).log10()).mean())}

    def picture(self) -> Tensor:
        """Return the first images, for a progress picture."""
        return self.images[:COLUMNS]

    def finish(self) -> Iterator[Path]:
        """Write image.png (all images side by side), images/1.png ... and index.html.

        Yields:
            Each path once it is written; progress/strip.png, which is there already, among them.

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
            yield report.write_page(self.run, self.PAGE, doubt)
