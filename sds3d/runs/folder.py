"""Run folders: numbers and names, atomic checkpoints, metrics, and what to say when the disk says no.

A run folder holds::

    outputs/00001-a-red-mug/
      config.yaml              everything that made it, resolved
      checkpoint.safetensors   tensors, and the rest of the state as JSON in the file's header: one file, one rename
      metrics.jsonl            a row a step
      progress/00050.png ...   the views of that step; strip.png has them all, oldest on top
      mesh.glb  mesh.json  turntable.mp4  preview.png     the mesh, and what is known of it
      index.html               all of it on one page
      pytorch_lora_weights.safetensors      where a diffusers teacher had a LoRA critic: that, as diffusers loads it

Every file is written beside its place and renamed into it, so that a reader, a crash or a full disk never
meets half a file. A checkpoint has a digest of its tensors and of its header, which is compared on loading. A process
that writes steps holds the lock of .lock; others are refused.

A run folder may come from somebody else. Nothing is written, deleted or shown through a link that leads out of it, and
a file of it that is damaged is skipped or refused by name.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import torch
from torch import Tensor

from sds3d.media.picture import DAMAGE
from sds3d.runtime import files, tensor_files
from sds3d.runtime.files import replacing, unwritable

if TYPE_CHECKING:
    import PIL.Image

CHECKPOINT_FORMAT = 1
_HEADER = "sds3d"  # the key of the JSON skeleton in the safetensors header
MOST_PIXELS = 100_000_000  # of a picture; those of a run have far fewer
STEMS = (  # of the files in a run folder, as a regular expression: what may be removed as a dead process's leftover
    r"(?:checkpoint|config|metrics|index|mesh|turntable|preview|image|grid|strip|eval|README|generator|pipeline|check|"
    r"pytorch_lora_weights|\d+)(?:-\d+)?(?:-texture)?"
)


def slug(prompt: str) -> str:
    """A folder name of at most 40 characters of [a-z0-9-]; "run" where nothing is left of the prompt."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    if len(words) > 40:
        cut = words[:41].rpartition("-")[0]  # at a word's end where there is one
        words = cut or words[:40]
    return words or "run"


class Restorable(Protocol):
    """What a checkpoint can be loaded into; see `sds3d.students.base.Student`."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """As torch's modules do."""
        ...


class Run:
    """One run folder. Use :meth:`create` or :meth:`open`."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoint = path / "checkpoint.safetensors"
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"

    @classmethod
    def create(cls, out: str | Path, prompt: str, config: str) -> Run:
        """A new folder ``out/NNNNN-slug`` with its config.yaml (text).

        Raises:
            ValueError: the folder cannot be made or written. Nothing is left behind.
        """
        out = files.user_path(out)
        try:
            out.mkdir(parents=True, exist_ok=True)
            path = cls._claim(out, slug(prompt))
        except OSError as error:
            raise ValueError(unwritable(out, error)) from error
        run = cls(path)
        try:
            run.write_text(run.config, config)
        except ValueError:
            run.discard()
            raise
        return run

    @staticmethod
    def _claim(out: Path, name: str) -> Path:
        """Make the next numbered folder. Who finds a second folder of that number gives way and tries again:
        both were made before both looked, so two processes never keep the same number."""
        while True:
            taken = [int(m[1]) for p in out.iterdir() if (m := re.match(r"(\d{5,})-", p.name))]
            path = out / f"{max(taken, default=0) + 1:05d}-{name}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            if len(list(out.glob(f"{path.name.partition('-')[0]}-*"))) == 1:
                return path
            path.rmdir()
            time.sleep(random.random() / 10)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run folder.

        Raises:
            ValueError: there is no such folder, or it holds no run.
        """
        path = files.user_path(path)
        if not path.is_dir():
            raise ValueError(f"there is no run folder {path}{_neighbours(path)}")
        if not (path / "config.yaml").is_file():
            raise ValueError(f"{path} is not a run folder (it has no config.yaml){_neighbours(path / 'x')}")
        if not files.is_own(path / "config.yaml", path):
            raise ValueError(f"{path / 'config.yaml'} is a link out of the run: put a file in its place")
        return cls(path)

    def write_text(self, path: Path, text: str) -> None:
        """Write a text file, whole or not at all. Raises ValueError when the disk says no."""
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")

    def save_checkpoint(self, state: dict) -> None:
        """Write the state (nested dicts, lists, tuples, tensors, str, int, float, bool, None) as one file.

        Raises:
            ValueError: the disk is full or not writable; the checkpoint that was there stays.
        """
        tensors: dict[str, Tensor] = {}
        skeleton = tensor_files.flatten({"format": CHECKPOINT_FORMAT, "state": state}, tensors)
        data = tensor_files.to_bytes(tensors or {"empty": torch.zeros(1)}, {_HEADER: json.dumps(skeleton)})
        with replacing(self.checkpoint) as part:
            part.write_bytes(data)

    def load_checkpoint(self) -> dict:
        """The state that :meth:`save_checkpoint` was given; tensors on the CPU.

        A checkpoint of before there were digests has none, and is taken as it is.

        Raises:
            ValueError: the checkpoint is missing, damaged or of another format.
        """
        if not self.checkpoint.is_file():
            raise ValueError(f"{self.path} has no checkpoint.safetensors yet; let it go on: sds3d resume {self.path}")
        damaged = f"{self.checkpoint} is damaged or is no checkpoint of sds3d"
        advice = f"put a sound copy of it there, or start again with --config {self.config}"
        try:
            tensors, header = tensor_files.read(self.checkpoint)
            text = header.pop(_HEADER)
            if header:
                raise ValueError("its header holds more than was written")
            state = tensor_files.unflatten(files.from_json(text), tensors)
            if not isinstance(state, dict):
                raise ValueError("its header holds no state")
        except (KeyError, TypeError, ValueError) as error:
            reason = str(error) if type(error) is ValueError else type(error).__name__
            raise ValueError(f"{damaged} ({reason}): {advice}") from error
        if state.get("format") != CHECKPOINT_FORMAT:
            raise ValueError(
                f"{self.checkpoint} has format {state.get('format')}, this version reads {CHECKPOINT_FORMAT}:"
                " it was made by another version of sds3d; use that one, or pip install --upgrade sds3d"
            )
        return state["state"]

    def discard(self) -> None:
        """Remove the folder: of a run that could not begin."""
        shutil.rmtree(self.path, ignore_errors=True)

    def lock(self) -> TextIO:
        """Keep other processes from writing steps here until what this returns is closed, or this process ends.

        Raises:
            ValueError: another process holds the lock.
        """
        return files.lock(self.path / ".lock", f"{self.path} is in use: wait until that is done, or stop it")

    def sweep(self) -> None:
        """Remove temporary files that processes which are dead now left here. Raises ValueError."""
        try:
            for folder in (self.path, *(self.folder(name) for name in ("progress", "images"))):
                files.sweep(folder, STEMS)
        except OSError as error:
            raise ValueError(unwritable(self.path, error)) from error

    def folder(self, name: str) -> Path:
        """A folder in this one. Raises ValueError where it leads out of the run: its files would be another's."""
        folder = self.path / name
        if not files.is_own(folder, self.path):
            raise ValueError(f"{folder} is a link out of the run, where nothing is written or deleted: remove the link")
        return folder

    def own(self, name: str) -> Path | None:
        """A file of this run by name; None where there is none, or where it is a link that leads out of the run."""
        path = self.path / name
        return path if path.is_file() and files.is_own(path, self.path) else None

    def load_student(self, student: Restorable) -> None:
        """Give a student the weights of the last checkpoint. Raises ValueError where they are not of such a student."""
        state = self.load_checkpoint()
        try:
            student.load_state_dict(state["student"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{self.checkpoint} does not fit {self.config}; was one of them edited?") from error

    def append(self, row: dict) -> None:
        """Add a row to metrics.jsonl. Raises ValueError when the disk says no."""
        if self.metrics.is_symlink():
            raise ValueError(f"{self.metrics} is a link, through which nothing is written: remove it")
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise ValueError(unwritable(self.metrics, error)) from error

    def rows(self) -> list[dict]:
        """The rows of metrics.jsonl that have a step; what is damaged is left out."""
        if self.own(self.metrics.name) is None:
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = files.from_json(line)
            except ValueError:
                continue
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
        return rows

    def rewind(self, step: int) -> None:
        """Forget rows and pictures after ``step``: a resumed run writes them again.

        Raises:
            ValueError: the disk says no, or progress is a link that leads out of the run.
        """
        self.folder("progress")
        kept = [row for row in self.rows() if row["step"] <= step]
        self.write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        for path in self.pictures():
            if int(path.stem) > step:
                path.unlink()

    def pictures(self) -> list[Path]:
        """The progress pictures, oldest first; none where progress is a link that leads out of the run."""
        found = [path for path in (self.path / "progress").glob("*.png") if re.fullmatch(r"\d{5,}", path.stem)]
        return sorted((p for p in found if p.is_file() and files.is_own(p, self.path)), key=lambda p: int(p.stem))

    def save_picture(self, step: int, views: Tensor) -> None:
        """Write progress/<step>.png from views (B, 3, H, W) in [0, 1], side by side, and renew strip.png."""
        folder = self.folder("progress")
        row = torch.cat(list(views.detach().cpu()), dim=-1)  # (3, H, B * W)
        save_png(folder / f"{step:05d}.png", row)
        save_png(folder / "strip.png", torch.cat([_load_png(p) for p in self.spread(8)], dim=-2))

    def spread(self, most: int) -> list[Path]:
        """At most ``most`` pictures spread over the run, the newest among them, all of the newest's size.

        Those that cannot be read are left out, with a warning that names them.
        """
        paths, newest = self.pictures(), None
        while paths and (newest := _size(paths[-1])) is None:
            paths.pop()
        if len(paths) > most:
            paths = [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]
        return [path for path in paths if _size(path) == newest]


def save_png(path: Path, image: Tensor) -> None:
    """Write an image (3, H, W) in [0, 1] as PNG, atomically."""
    from PIL import Image

    array = (image.clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    with replacing(path) as part:
        Image.fromarray(array).save(part)


def open_picture(path: Path) -> PIL.Image.Image:
    """A picture of a run, whole, as RGB. Raises ValueError where it is none, is damaged or has too many pixels."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                if file.width * file.height > MOST_PIXELS:
                    raise ValueError(f"it has {file.width} x {file.height} pixels")
                return file.convert("RGB")
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from error


def _load_png(path: Path) -> Tensor:
    """(3, H, W) in [0, 1]. Raises ValueError."""
    import numpy

    return torch.from_numpy(numpy.array(open_picture(path))).permute(2, 0, 1) / 255


def _size(path: Path) -> tuple[int, int] | None:
    """Pixels of a picture; None, with a warning that names it, where it cannot be read."""
    try:
        return open_picture(path).size
    except ValueError as error:
        warnings.warn(f"left out: {error}", stacklevel=3)
        return None


def _neighbours(path: Path) -> str:
    """ "; runs there: ..." with the newest runs beside a path, or nothing."""
    parent = path.parent
    found = sorted(p.name for p in parent.glob("[0-9]*-*") if (p / "config.yaml").is_file()) if parent.is_dir() else []
    return f"; runs in {parent}: {', '.join(found[-5:])}" if found else ""
