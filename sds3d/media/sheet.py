"""Contact sheets: rows of images with labels, as one PNG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from sds3d.cameras import Cameras, orbit
from sds3d.runtime.files import replacing

FORMATS = (".png", ".jpg")
GAP = 2  # pixels between tiles
LABEL = 14  # pixels above a row for its label
VISIBLE = 32  # least pixels a side of a tile in `seen`

Render = Callable[[Cameras], Tensor]  # cameras (B) -> images (B, 3, H, W) in [0, 1]


def to_bytes(images: Tensor) -> np.ndarray:
    """Convert images (B, 3, H, W) in [0, 1] to (B, H, W, 3) uint8. Values outside are clipped."""
    assert images.ndim == 4 and images.shape[1] == 3, images.shape
    scaled = images.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def resize(images: Tensor, size: int) -> Tensor:
    """Resize square images (B, 3, H, H) to (B, 3, size, size) in [0, 1]: area average down, bicubic up."""
    if images.shape[-1] == size:
        return images
    mode = "area" if images.shape[-1] > size else "bicubic"
    return torch.nn.functional.interpolate(images, size=(size, size), mode=mode).clamp(0, 1)


def seen(images: Tensor) -> int:
    """Return the size of a tile in pixels for images (B, 3, H, W): their own width, at least VISIBLE."""
    return max(images.shape[-1], VISIBLE)


def contact_sheet(
    rows: Sequence[Tensor], path: str | Path, labels: Sequence[str] | None = None, size: int | None = None
) -> Path:
    """Write rows of images as one PNG or JPEG.

    Args:
        rows: each (B, 3, H, W) in [0, 1]; B may differ from row to row.
        path: ends in .png or .jpg.
        labels: one line of text for each row, drawn above it.
        size: pixels a side of each tile; the images' own by default.

    Raises:
        ValueError: a row has no images, the labels do not match the rows, or the file cannot be written.
    """
    if not rows or any(len(row) == 0 for row in rows):
        raise ValueError("a contact sheet needs at least one row, and an image in every row")
    if labels is not None and len(labels) != len(rows):
        raise ValueError(f"a contact sheet of {len(rows)} rows got {len(labels)} labels; give one per row")
    from PIL import Image, ImageDraw

    tiles = [to_bytes(row if size is None else resize(row, size)) for row in rows]
    head = LABEL if labels is not None else 0
    width = max(len(row) * (row.shape[2] + GAP) - GAP for row in tiles)
    height = sum(head + row.shape[1] + GAP for row in tiles) - GAP
    sheet = np.full((height, width, 3), 255, dtype=np.uint8)
    tops, y = [], 0
    for row in tiles:
        tops.append(y)
        y += head
        for i, tile in enumerate(row):
            x = i * (row.shape[2] + GAP)
            sheet[y : y + row.shape[1], x : x + row.shape[2]] = tile
        y += row.shape[1] + GAP
    image = Image.fromarray(sheet)
    for top, label in zip(tops, labels or ()):
        ImageDraw.Draw(image).text((2, top + 1), label, fill=(60, 60, 60))
    path = Path(path)
    with replacing(path, FORMATS) as temporary:
        image.save(temporary)
    return path


def preview(render: Render, path: str | Path, views: int = 8, size: int = 128) -> Path:
    """Write a row of views from cameras evenly around the object, the front first."""
    return contact_sheet([render(orbit(views))], path, size=size)


def side_by_side(
    truth: Tensor,
    ours: Tensor,
    path: str | Path,
    columns: int = 8,
    size: int = 96,
    below: Mapping[str, Tensor] = MappingProxyType({}),
) -> Path:
    """Write the true views (B, 3, H, W) above ours, ``columns`` per row.

    Args:
        below: label -> images (B, 3, H, W) of further rows.
    """
    assert truth.shape == ours.shape, (truth.shape, ours.shape)
    rows = [part for pair in zip(truth.split(columns), ours.split(columns)) for part in pair]
    labels = ["truth", "ours"] * (len(rows) // 2)
    return contact_sheet([*rows, *below.values()], path, labels=[*labels, *below], size=size)
