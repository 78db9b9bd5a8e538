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
meets half a file.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from pathlib import Path

import torch
from torch import Tensor

from sds3d.files import replacing, unwritable

CHECKPOINT_FORMAT = 1
_HEADER = "sds3d"  # the key of the JSON skeleton in the safetensors header


def slug(prompt: str) -> str:
    """A folder name of at most 40 characters of [a-z0-9-]; "run" where nothing is left of the prompt."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    if len(words) > 40:
        cut = words[:41].rpartition("-")[0]  # at a word's end where there is one
        words = cut or words[:40]
    return words or "run"


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
        out = Path(out).expanduser()
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
        path = Path(path).expanduser()
        if not path.is_dir():
            raise ValueError(f"there is no run folder {path}{_neighbours(path)}")
        if not (path / "config.yaml").is_file():
            raise ValueError(f"{path} is not a run folder (it has no config.yaml){_neighbours(path / 'x')}")
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
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        skeleton = _flatten({"format": CHECKPOINT_FORMAT, "state": state}, "", tensors)
        data = save(tensors or {"empty": torch.zeros(1)}, metadata={_HEADER: json.dumps(skeleton)})
        with replacing(self.checkpoint) as part:
            part.write_bytes(data)

    def load_checkpoint(self) -> dict:
        """The state that :meth:`save_checkpoint` was given; tensors on the CPU.

        Raises:
            ValueError: the checkpoint is missing, damaged or of another format.
        """
        from safetensors import SafetensorError, safe_open

        if not self.checkpoint.is_file():
            raise ValueError(f"{self.path} has no checkpoint.safetensors yet; start again with sds3d generate")
        damaged = f"{self.checkpoint} is damaged or is no checkpoint of sds3d"
        try:
            with safe_open(self.checkpoint, "pt") as file:
                skeleton = json.loads((file.metadata() or {})[_HEADER])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            state = _unflatten(skeleton, tensors)
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{damaged} ({type(error).__name__}); start again with sds3d generate") from error
        if state.get("format") != CHECKPOINT_FORMAT:
            raise ValueError(
                f"{self.checkpoint} has format {state.get('format')}, this version reads {CHECKPOINT_FORMAT}:"
                " it was made by another version of sds3d; use that one, or pip install --upgrade sds3d"
            )
        return state["state"]

    def discard(self) -> None:
        """Remove the folder: of a run that could not begin."""
        shutil.rmtree(self.path, ignore_errors=True)

    def append(self, row: dict) -> None:
        """Add a row to metrics.jsonl. Raises ValueError when the disk says no."""
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise ValueError(unwritable(self.metrics, error)) from error

    def rows(self) -> list[dict]:
        """The rows of metrics.jsonl; a last line that was cut short is left out."""
        if not self.metrics.is_file():
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def rewind(self, step: int) -> None:
        """Forget rows and pictures after ``step``: a resumed run writes them again."""
        kept = [row for row in self.rows() if row.get("step", 0) <= step]
        self.write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))
        for path in self.pictures():
            if int(path.stem) > step:
                path.unlink()

    def pictures(self) -> list[Path]:
        """The progress pictures, oldest first."""
        return sorted((self.path / "progress").glob("[0-9]*.png"))

    def save_picture(self, step: int, views: Tensor) -> None:
        """Write progress/<step>.png from views (B, 3, H, W) in [0, 1], side by side, and renew strip.png."""
        folder = self.path / "progress"
        row = torch.cat(list(views.detach().cpu()), dim=-1)  # (3, H, B * W)
        save_png(folder / f"{step:05d}.png", row)
        save_png(folder / "strip.png", torch.cat([_load_png(p) for p in self.spread(8)], dim=-2))

    def spread(self, most: int) -> list[Path]:
        """At most ``most`` pictures spread over the run, the newest among them, all of the newest's size."""
        paths = self.pictures()
        if len(paths) > most:
            paths = [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]
        size = _load_png(paths[-1]).shape
        return [p for p in paths if _load_png(p).shape == size]


def save_png(path: Path, image: Tensor) -> None:
    """Write an image (3, H, W) in [0, 1] as PNG, atomically."""
    from PIL import Image

    array = (image.clamp(0, 1) * 255 + 0.5).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    with replacing(path) as part:
        Image.fromarray(array).save(part)


def _load_png(path: Path) -> Tensor:
    """(3, H, W) in [0, 1]."""
    import numpy
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1) / 255


def _neighbours(path: Path) -> str:
    """ "; runs there: ..." with the newest runs beside a path, or nothing."""
    parent = path.parent
    found = sorted(p.name for p in parent.glob("[0-9]*-*") if (p / "config.yaml").is_file()) if parent.is_dir() else []
    return f"; runs in {parent}: {', '.join(found[-5:])}" if found else ""


def _flatten(value: object, path: str, tensors: dict[str, Tensor]) -> object:
    """JSON for ``value``; tensors go to ``tensors`` under their path. Keys that are no text keep their type."""
    if isinstance(value, Tensor):
        key = path.strip("/")
        tensors[key] = value.detach().cpu().contiguous().clone()  # a clone: safetensors refuses shared memory
        return {"$tensor": key}
    if isinstance(value, dict):
        items = [[k, _flatten(v, f"{path}/{k}", tensors)] for k, v in value.items()]
        return dict(items) if all(isinstance(k, str) for k in value) else {"$items": items}
    if isinstance(value, list | tuple):
        parts = [_flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return parts if isinstance(value, list) else {"$tuple": parts}
    assert value is None or isinstance(value, str | int | float | bool), (path, type(value))
    return value


def _unflatten(value: object, tensors: dict[str, Tensor]) -> object:
    if isinstance(value, list):
        return [_unflatten(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_unflatten(v, tensors) for v in value["$tuple"])
    if "$items" in value:
        return {k: _unflatten(v, tensors) for k, v in value["$items"]}
    return {k: _unflatten(v, tensors) for k, v in value.items()}
