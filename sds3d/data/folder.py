"""Reads a user's folder of images with captions.

Captions are in a .txt beside each image, one per line, of which training draws one; or in a table, captions.csv or
captions.jsonl, with the columns file and caption. The names of dataset libraries are read, too: metadata.csv and
metadata.jsonl, with file_name and text. A table may lie in a subfolder, as train/metadata.jsonl; its file names are
relative to that subfolder. An image may have several rows.
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
FILES = ("file", "file_name", "filename")  # names of the column of files, in any case
CAPTIONS = ("caption", "text")  # names of the column of captions


@dataclass
class Folder:
    """The content of a folder.

    Args:
        pictures: the images that can be used.
        skipped: a line of text for each image, caption and row of a table that cannot be used, with the reason.
    """

    pictures: Pictures
    skipped: list[str] = field(default_factory=list)


def read(folder: str | Path, size: int, longest: int) -> Folder:
    """Read a folder of images with captions.

    Args:
        folder: images in subfolders are read, too.
        size: the central square of each image is resized to this many pixels.
        longest: most words of a caption; longer ones are skipped.

    Raises:
        ValueError: there is no such folder, it holds no image or none with a caption, or a table cannot be read.
    """
    folder = user_path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give one of images with captions")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and not path.is_dir())
    if not files:
        raise ValueError(f"{folder} holds no image ({', '.join(IMAGES)}); give a folder of images with captions")
    by_file, skipped = _tables(folder)
    images, captions = [], []
    for path in files:
        name = path.relative_to(folder).as_posix()
        try:
            texts = by_file.pop(unicodedata.normalize("NFC", name), None) or _beside(path)
            lengths = [len(words(text)) for text in texts]
            skipped += [f"{name}: a caption of {n} words, at most {longest} are read" for n in lengths if n > longest]
            if min(lengths) <= longest:
                images.append(picture.read(path, size))
                captions.append(tuple(text for text, n in zip(texts, lengths) if n <= longest))
        except ValueError as error:
            skipped.append(f"{name}: {error}")
    skipped += [f"{name}: it has a caption, and the file is missing" for name in by_file]
    if not images:
        raise ValueError(
            f"none of the {len(files)} images in {folder} can be used ({'; '.join(skipped[:3])}); "
            "put a .txt with the caption beside each image, or write captions.csv with the columns file and caption"
        )
    return Folder(Pictures(torch.stack(images), captions), skipped)


def _tables(folder: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Captions by file, relative to the folder, from all tables in it; and a line for each row that cannot be used."""
    by_file: dict[str, list[str]] = {}
    skipped: list[str] = []
    for path in sorted(path for path in folder.rglob("*") if path.name.lower() in TABLES and not path.is_dir()):
        table = path.relative_to(folder)
        try:
            rows = list(_rows(path))
        except ValueError as error:
            if table.stem.lower() != "metadata":
                raise
            skipped.append(f"{table.as_posix()}: {error}")  # a file of this name may hold other metadata
            continue
        for number, row, fault in rows:
            file, texts = _of_row(row)
            if file and texts and not fault:
                by_file.setdefault(_relative(table.parent, file, folder), []).extend(texts)
            else:
                skipped.append(f"{table.as_posix()}, {number}: {fault or 'it needs file and caption'}")
    return by_file, skipped


def _of_row(row: dict) -> tuple[str, list[str]]:
    """The file that a row of a table names, "" if it names none, and the row's captions that have words."""
    values = {str(key).strip().lower(): value for key, value in row.items()}
    file = next((str(values[key] or "").strip() for key in FILES if key in values), "")
    captions = [values[key] for key in CAPTIONS if key in values]
    texts = [text for value in captions for text in (value if isinstance(value, list) else [value])]
    texts = [str(text).strip() for text in texts if isinstance(text, str | int | float)]
    return file, [text for text in texts if words(text)]


def _relative(subfolder: Path, file: str, folder: Path) -> str:
    """A file that a table in ``subfolder`` names, relative to the folder. If it is missing, \\ is read as /."""
    if not os.path.isfile(folder / subfolder / file):  # also False for texts that cannot be a path
        file = file.replace("\\", "/")
    return unicodedata.normalize("NFC", posixpath.normpath(posixpath.join(subfolder.as_posix(), file)))


def _rows(path: Path) -> Iterator[tuple[str, dict, str]]:
    """The rows of a table: its number as text, its values, and what is wrong with it, "" for nothing.

    Raises:
        ValueError: the table cannot be read.
    """
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
    """The JSON object in a line. Raises ValueError if there is none."""
    try:
        row = from_json(line.rstrip("\n"))
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error.msg}, column {error.colno})") from error
    if not isinstance(row, dict):
        raise ValueError("it must be an object with file and caption")
    return row


def _rows_of_csv(path: Path, text: io.StringIO) -> Iterator[tuple[str, dict, str]]:
    """The rows of a CSV table. Raises ValueError if a row is broken, or the header lacks a column."""
    table = csv.reader(text, strict=True)  # not strict, it would read on after a quote that is never closed
    rows, begun = [], 1
    try:
        for row in table:
            rows += [row] if row else []  # skips blank lines
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
    """The captions in the .txt beside an image, one per line. Raises ValueError if there are none."""
    text = path.with_suffix(".txt")
    lines = read_text(text).splitlines() if text.exists() else []
    captions = [line.strip() for line in lines if words(line)]
    if not captions:
        raise ValueError("no caption")
    return captions
