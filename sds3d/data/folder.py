"""A user's own pictures with captions.

A folder of images, and what they show: a .txt beside each image (every line a caption that may be drawn), or one
captions.csv (columns file, caption) or captions.jsonl (objects with file and caption). An image may have several rows.
What is transparent becomes white.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sds3d.data.pictures import Pictures
from sds3d.files import from_json
from sds3d.prompts import words

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = ("captions.csv", "captions.jsonl")


@dataclass
class Folder:
    """What was found.

    Args:
        pictures: the images that can be used.
        skipped: a line for each image and each caption that cannot, and why.
    """

    pictures: Pictures
    skipped: list[str] = field(default_factory=list)


def read(folder: str | Path, size: int, longest: int) -> Folder:
    """Read a folder of images with captions: the middle square of each, shrunk or grown to ``size`` pixels.

    Args:
        longest: words of a caption that can be read; longer ones are skipped.

    Raises:
        ValueError: there is no such folder, no image in it, a table that cannot be read, or no image with a caption.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give one of images with captions")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
    if not files:
        raise ValueError(f"{folder} holds no image ({', '.join(IMAGES)}); give a folder of images with captions")
    said, skipped = _table(folder)
    images, captions = [], []
    for path in files:
        name = path.relative_to(folder).as_posix()
        try:
            told = said.pop(name, None) or _beside(path)
            lengths = [len(words(text)) for text in told]
            skipped += [f"{name}: a caption of {n} words, at most {longest} are read" for n in lengths if n > longest]
            if min(lengths) <= longest:
                images.append(_pixels(path, size))
                captions.append(tuple(text for text, n in zip(told, lengths) if n <= longest))
        except ValueError as error:
            skipped.append(f"{name}: {error}")
    skipped += [f"{name}: captioned and not there" for name in said]
    if not images:
        raise ValueError(
            f"none of the {len(files)} images in {folder} can be used ({'; '.join(skipped[:3])}); "
            "put a .txt with the caption beside each image, or write captions.csv with the columns file and caption"
        )
    return Folder(Pictures(torch.stack(images), captions), skipped)


def _table(folder: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Captions by file from captions.csv or captions.jsonl, and the rows that say nothing."""
    said: dict[str, list[str]] = {}
    skipped: list[str] = []
    for path in (folder / name for name in TABLES):
        if not path.is_file():
            continue
        for number, row in enumerate(_rows(path), start=1):
            name, text = (str(row.get(key) or "").strip() for key in ("file", "caption"))
            if name and words(text):
                said.setdefault(name.removeprefix("./"), []).append(text)
            else:
                skipped.append(f"{path.name}, row {number}: it needs file and caption")
    return said, skipped


def _rows(path: Path) -> Iterator[dict]:
    """The rows of a table. Raises ValueError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline=""))) if path.suffix == ".csv" else None
        if rows is None:
            rows = [from_json(line) for line in text.splitlines() if line.strip()]
    except (OSError, csv.Error, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"cannot read {path}: every line must be an object with file and caption")
    yield from rows


def _beside(path: Path) -> list[str]:
    """The captions in the .txt beside an image, one a line. Raises ValueError where there is none."""
    text = path.with_suffix(".txt")
    try:
        lines = text.read_text(encoding="utf-8-sig").splitlines() if text.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{text.name} cannot be read ({type(error).__name__})") from error
    found = [line.strip() for line in lines if words(line)]
    if not found:
        raise ValueError("no caption")
    return found


def _pixels(path: Path, size: int) -> torch.Tensor:
    """(3, size, size) uint8, the middle square. Raises ValueError where it is no image."""
    import numpy
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            whole = ImageOps.exif_transpose(file)
            if whole.mode.startswith("I"):  # 16 bits of grey, which convert would clip at 255
                whole = Image.fromarray((numpy.asarray(whole) // 257).astype(numpy.uint8))
            square = ImageOps.fit(whole.convert("RGBA"), (size, size), Image.Resampling.LANCZOS)
            shown = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square).convert("RGB")
            return torch.from_numpy(numpy.array(shown)).permute(2, 0, 1).contiguous()
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"it cannot be read ({type(error).__name__})") from error
