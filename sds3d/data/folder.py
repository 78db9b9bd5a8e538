"""A user's own pictures with captions.

A folder of images, and what they show: a .txt beside each image (every line a caption that may be drawn), or a table,
captions.csv or captions.jsonl, whose rows have file and caption. The names that datasets libraries use are read, too:
metadata.csv and metadata.jsonl, with file_name and text. A table may lie in a folder below, as train/metadata.jsonl;
its file names count from there. An image may have several rows.
"""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sds3d.data.pictures import Pictures
from sds3d.media import picture
from sds3d.prompts import words
from sds3d.runtime.files import from_json, read_text, user_path

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
FILES = ("file", "file_name", "filename")  # columns, whatever their case
CAPTIONS = ("caption", "text")


@dataclass
class Folder:
    """What was found.

    Args:
        pictures: the images that can be used.
        skipped: a line for each image, each caption and each row of a table that cannot, and why.
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
    folder = user_path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give one of images with captions")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and not path.is_dir())
    if not files:
        raise ValueError(f"{folder} holds no image ({', '.join(IMAGES)}); give a folder of images with captions")
    said, skipped = _table(folder)
    images, captions = [], []
    for path in files:
        name = path.relative_to(folder).as_posix()
        try:
            told = said.pop(unicodedata.normalize("NFC", name), None) or _beside(path)
            lengths = [len(words(text)) for text in told]
            skipped += [f"{name}: a caption of {n} words, at most {longest} are read" for n in lengths if n > longest]
            if min(lengths) <= longest:
                images.append(picture.read(path, size))
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
    """Captions by file, which is named from the folder, from all tables in it, and the rows that cannot be used."""
    said: dict[str, list[str]] = {}
    skipped: list[str] = []
    for path in sorted(path for path in folder.rglob("*") if path.name.lower() in TABLES and not path.is_dir()):
        place = path.relative_to(folder)
        try:
            rows = list(_rows(path))
        except ValueError as error:
            if place.stem.lower() != "metadata":
                raise
            skipped.append(f"{place.as_posix()}: {error}")  # which may be about something else
            continue
        for where, row, fault in rows:
            file, texts = _of_row(row)
            if file and texts and not fault:
                said.setdefault(_named(place.parent, file, folder), []).extend(texts)
            else:
                skipped.append(f"{place.as_posix()}, {where}: {fault or 'it needs file and caption'}")
    return said, skipped


def _of_row(row: dict) -> tuple[str, list[str]]:
    """The file that a row of a table names, "" where it names none, and the captions with words in it."""
    values = {str(key).strip().lower(): value for key, value in row.items()}
    file = next((str(values[key] or "").strip() for key in FILES if key in values), "")
    said = [values[key] for key in CAPTIONS if key in values]
    texts = [text for value in said for text in (value if isinstance(value, list) else [value])]
    texts = [str(text).strip() for text in texts if isinstance(text, str | int | float)]
    return file, [text for text in texts if words(text)]


def _named(below: Path, file: str, folder: Path) -> str:
    """A file that a table in ``below`` names, from the folder; a Windows path is one where no file has that name."""
    if not os.path.isfile(folder / below / file):  # which is False where the text can be no path
        file = file.replace("\\", "/")
    return unicodedata.normalize("NFC", posixpath.normpath(posixpath.join(below.as_posix(), file)))


def _rows(path: Path) -> Iterator[tuple[str, dict, str]]:
    """Where each row of a table is, what it says, and what is wrong with it, if anything. Raises ValueError where the
    table cannot be read."""
    text = io.StringIO(read_text(path), newline=None)
    if path.suffix.lower() != ".jsonl":
        yield from _rows_of_csv(path, text)
        return
    for number, line in enumerate(text, start=1):
        if line.strip():
            try:
                yield f"line {number}", _row_of_json(line), ""
            except ValueError as error:
                yield f"line {number}", {}, str(error)


def _row_of_json(line: str) -> dict:
    """The object in a line. Raises ValueError where there is none."""
    try:
        row = from_json(line.rstrip("\n"))
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error.msg}, column {error.colno})") from error
    if not isinstance(row, dict):
        raise ValueError("it must be an object with file and caption")
    return row


def _rows_of_csv(path: Path, text: io.StringIO) -> Iterator[tuple[str, dict, str]]:
    """The rows of comma-separated values. Raises ValueError where one is broken, or the header names no file."""
    table = csv.reader(text, strict=True)  # else a quote that is never closed swallows what follows
    rows, begun = [], 1
    try:
        for row in table:
            rows += [row] if row else []  # a blank line is none
            begun = table.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"cannot read {path}: the row that begins on line {begun} is broken ({error}); is a quote never closed? "
            'Write "" for a quote in a caption in quotes'
        ) from error
    header = rows[0] if rows else []
    known = {name.strip().lower() for name in header}
    if len(rows) > 1 and not (known & set(FILES) and known & set(CAPTIONS)):
        raise ValueError(
            f"cannot read {path}: its header is {','.join(header)!r}; give it the columns file (or file_name) and "
            "caption (or text), with a comma between"
        )
    for number, row in enumerate(rows[1:], start=1):
        fault = "more values than the header has names; put a caption with commas in quotes"
        yield f"row {number}", dict(zip(header, row)), fault if len(row) > len(header) else ""


def _beside(path: Path) -> list[str]:
    """The captions in the .txt beside an image, one a line. Raises ValueError where none can be read."""
    text = path.with_suffix(".txt")
    lines = read_text(text).splitlines() if text.exists() else []
    found = [line.strip() for line in lines if words(line)]
    if not found:
        raise ValueError("no caption")
    return found
