"""Run folders: names, checkpoints, metrics, progress pictures, and errors of the disk.

A run folder holds::

    outputs/00001-a-red-mug/
      config.yaml              all settings of the run, resolved
      checkpoint.safetensors   the tensors; the rest of the state is JSON in the file's header
      metrics.jsonl            one row per step
      progress/00050.png ...   the views of that step; strip.png has them all, oldest on top
      mesh.glb  mesh.json  turntable.mp4  preview.png     the mesh, its report, and pictures of the scene
      index.html               all of it on one page
      pytorch_lora_weights.safetensors      the LoRA critic of a diffusers teacher, in diffusers' format

Every file is written under a temporary name and then renamed, so that no reader, crash or full disk leaves half a
file. A checkpoint has a digest of its tensors and its header, which is compared on loading. A process that writes
steps holds the lock .lock; other processes are refused.

A run folder may come from a stranger. Nothing is written, deleted or shown through a link that leads out of it. A
damaged file in it is skipped, or refused by name.
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
MOST_PIXELS = 100_000_000  # of a picture that is opened; a run's own pictures have far fewer
STEMS = (  # names of a run's files, as a regular expression: `Run.sweep` removes temporary files of these names only
    r"(?:checkpoint|config|metrics|index|mesh|turntable|preview|image|grid|strip|eval|README|generator|pipeline|check|"
    r"pytorch_lora_weights|\d+)(?:-\d+)?(?:-texture)?"
)


def slug(prompt: str) -> str:
    """Return a folder name of at most 40 characters of [a-z0-9-]; "run" if no such character is in the prompt."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    if len(words) > 40:
        cut = words[:41].rpartition("-")[0]  # at a word's end where there is one
        words = cut or words[:40]
    return words or "run"


class Restorable(Protocol):
    """An object that a checkpoint can be loaded into; see `sds3d.students.base.Student`."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """See `torch.nn.Module.load_state_dict`."""
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
        """Create a folder ``out/NNNNN-slug`` and write its config.yaml.

        Args:
            out: the folder of runs.
            prompt: names the folder; see `slug`.
            config: the text of config.yaml.

        Raises:
            ValueError: the folder cannot be created or written. Nothing is left behind.
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
        """Make the next numbered folder.

        Two processes may make a folder of the same number at once. Each looks after it has made its own, so at least
        one sees both; whoever does removes its own and tries again.
        """
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
        """Open an existing run folder.

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
        """Write a text file atomically. Raises ValueError if it cannot be written."""
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")

    def save_checkpoint(self, state: dict) -> None:
        """Write the state (nested dicts, lists, tuples, tensors, str, int, float, bool, None) as one file.

        Raises:
            ValueError: the disk is full or not writable; the earlier checkpoint stays.
        """
        tensors: dict[str, Tensor] = {}
        skeleton = tensor_files.flatten({"format": CHECKPOINT_FORMAT, "state": state}, tensors)
        data = tensor_files.to_bytes(tensors or {"empty": torch.zeros(1)}, {_HEADER: json.dumps(skeleton)})
        with replacing(self.checkpoint) as part:
            part.write_bytes(data)

    def load_checkpoint(self) -> dict:
        """Return the state that :meth:`save_checkpoint` wrote, with tensors on the CPU.

        Checkpoints written before digests existed are loaded unchecked.

        Raises:
            ValueError: the checkpoint is missing, damaged or of another format.
        """
        if not self.checkpoint.is_file():
            raise ValueError(f"{self.path} has no checkpoint.safetensors yet; continue it: sds3d resume {self.path}")
        damaged = f"{self.checkpoint} is damaged or is no checkpoint of sds3d"
        advice = f"put a sound copy of it there, or start again with --config {self.config}"
        try:
            tensors, header = tensor_files.read(self.checkpoint)
            text = header.pop(_HEADER)
            if header:
                raise ValueError("its header has unknown entries")
            state = tensor_files.unflatten(files.from_json(text), tensors)
            if not isinstance(state, dict):
                raise ValueError("its header has no state")
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
        """Remove the folder of a run that could not begin."""
        shutil.rmtree(self.path, ignore_errors=True)

    def lock(self) -> TextIO:
        """Lock the folder against other processes that would write steps.

        Returns:
            The lock. It is released when it is closed, or when this process ends.

        Raises:
            ValueError: another process holds the lock.
        """
        return files.lock(self.path / ".lock", f"{self.path} is in use: wait until that is done, or stop it")

    def sweep(self) -> None:
        """Remove temporary files that ended processes have left. Raises ValueError if they cannot be removed."""
        try:
            for folder in (self.path, *(self.folder(name) for name in ("progress", "images"))):
                files.sweep(folder, STEMS)
        except OSError as error:
            raise ValueError(unwritable(self.path, error)) from error

    def folder(self, name: str) -> Path:
        """Return the path of a subfolder. Raises ValueError if it is a link that leads out of the run."""
        folder = self.path / name
        if not files.is_own(folder, self.path):
            raise ValueError(f"{folder} is a link out of the run, where nothing is written or deleted: remove the link")
        return folder

    def own(self, name: str) -> Path | None:
        """Return the path of a file of this run; None if it is missing or a link that leads out of the run."""
        path = self.path / name
        return path if path.is_file() and files.is_own(path, self.path) else None

    def load_student(self, student: Restorable) -> None:
        """Load the last checkpoint into a student. Raises ValueError if it does not fit the student."""
        state = self.load_checkpoint()
        try:
            student.load_state_dict(state["student"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{self.checkpoint} does not fit {self.config}; was one of them edited?") from error

    def append(self, row: dict) -> None:
        """Append a row to metrics.jsonl. Raises ValueError if it cannot be written."""
        if self.metrics.is_symlink():
            raise ValueError(f"{self.metrics} is a link, through which nothing is written: remove it")
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise ValueError(unwritable(self.metrics, error)) from error

    def rows(self) -> list[dict]:
        """Return the rows of metrics.jsonl. Damaged rows, and rows without a step, are left out."""
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
        """Delete the rows and pictures after ``step``, which a resumed run writes again.

        Raises:
            ValueError: the disk is not writable, or progress is a link that leads out of the run.
        """
        self.folder("progress")
        kept = [row for row in self.rows() if row["step"] <= step]
        self.write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        for path in self.pictures():
            if int(path.stem) > step:
                path.unlink()

    def pictures(self) -> list[Path]:
        """Return the paths of the progress pictures, oldest first; none if progress is a link out of the run."""
        paths = [path for path in (self.path / "progress").glob("*.png") if re.fullmatch(r"\d{5,}", path.stem)]
        return sorted((p for p in paths if p.is_file() and files.is_own(p, self.path)), key=lambda p: int(p.stem))

    def save_picture(self, step: int, views: Tensor) -> None:
        """Write views (B, 3, H, W) in [0, 1] side by side into progress/<step>.png, and write strip.png again."""
        folder = self.folder("progress")
        row = torch.cat(list(views.detach().cpu()), dim=-1)  # (3, H, B * W)
        save_png(folder / f"{step:05d}.png", row)
        save_png(folder / "strip.png", torch.cat([_load_png(p) for p in self.spread(8)], dim=-2))

    def spread(self, most: int) -> list[Path]:
        """Return the paths of at most ``most`` progress pictures, evenly spread over the run.

        The newest is among them, and all have its size. Pictures that cannot be read are left out, with a warning that
        names them.
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
    """Read a picture as RGB. Raises ValueError if it is no picture, is damaged or has more than MOST_PIXELS pixels."""
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
    """Read a picture as a tensor (3, H, W) in [0, 1]. Raises ValueError; see `open_picture`."""
    import numpy

    return torch.from_numpy(numpy.array(open_picture(path))).permute(2, 0, 1) / 255


def _size(path: Path) -> tuple[int, int] | None:
    """Width and height of a picture in pixels; None, with a warning that names it, if it cannot be read."""
    try:
        return open_picture(path).size
    except ValueError as error:
        warnings.warn(f"left out: {error}", stacklevel=3)
        return None


def _neighbours(path: Path) -> str:
    """Text for a message, "; runs in ...", that names the newest runs beside a path; "" if there are none."""
    parent = path.parent
    names = sorted(p.name for p in parent.glob("[0-9]*-*") if (p / "config.yaml").is_file()) if parent.is_dir() else []
    return f"; runs in {parent}: {', '.join(names[-5:])}" if names else ""
