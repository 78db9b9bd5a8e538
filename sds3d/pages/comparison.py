"""Rows of figures and pictures as one HTML page and one contact sheet.

The page holds its pictures, so that it can be sent as it is.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from sds3d.media import sheet
from sds3d.pages import html as web

STYLE = """
body { max-width: 84rem }
.card { overflow-x: auto; margin: .5rem 0 2rem }
table { border-collapse: collapse; width: 100% }
td, th { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line) }
td:first-child, th:first-child { text-align: left }
td:last-child { text-align: left }
img { height: 96px; display: block }
b { color: var(--accent) }
"""


@dataclass(frozen=True)
class Figure:
    """A figure: its heading, how many decimals, and whether more is better (None: neither)."""

    heading: str
    decimals: int = 3
    more: bool | None = None


@dataclass(frozen=True)
class Row:
    """A line of a table: a label, figures by column (None and missing ones are left blank), pictures (B, 3, H, W).

    A reference is shown for comparison, and is never the best of its section.
    """

    label: str
    figures: Mapping[str, float | None] = field(default_factory=dict)
    pictures: Tensor | None = None
    reference: bool = False


@dataclass(frozen=True)
class Section:
    """A table with a heading."""

    heading: str
    rows: Sequence[Row]


def write(path: Path, title: str, note: str, columns: Mapping[str, Figure], sections: Sequence[Section]) -> Path:
    """Write the page.

    Args:
        path: ends in .html.
        title, note: above everything; plain text.
        columns: the figures shown, in this order; the best of a section is bold.

    Raises:
        ValueError: a place that cannot be written.
    """
    body = "\n".join(_table(section, columns) for section in sections)
    top = f'<h1>{html.escape(title)}</h1>\n<p class="soft">{html.escape(note)}</p>\n'
    return web.write(path, title, top + body, STYLE)


def contact_sheet(path: Path, sections: Sequence[Section]) -> Path:
    """Write the pictures alone, a row a line, with the heading and the label above each. Raises ValueError."""
    rows = [(f"{s.heading}: {r.label}", r.pictures) for s in sections for r in s.rows if r.pictures is not None]
    return sheet.contact_sheet([pictures for _, pictures in rows], path, [label for label, _ in rows])


def shown(value: float | None, column: Figure) -> str:
    """A figure as text; "" for None."""
    return "" if value is None else f"{value:.{column.decimals}f}"


def best(rows: Sequence[Row], name: str, column: Figure) -> str:
    """The best figure of a column as text, "" where there is none."""
    values = [value for row in rows if (value := row.figures.get(name)) is not None]
    if column.more is None or len(values) < 2:
        return ""
    return shown(max(values) if column.more else min(values), column)


def _table(section: Section, columns: Mapping[str, Figure]) -> str:
    used = {n: c for n, c in columns.items() if any(row.figures.get(n) is not None for row in section.rows)}
    rivals = [row for row in section.rows if not row.reference]
    top = {name: best(rivals, name, column) for name, column in used.items()}
    head = "".join(f"<th>{html.escape(column.heading)}</th>" for column in used.values())
    lines = []
    for row in section.rows:
        cells = [f"<td>{html.escape(row.label)}</td>"]
        for name, column in used.items():
            text = shown(row.figures.get(name), column)
            bold = text and text == top[name] and not row.reference
            cells.append(f"<td><b>{text}</b></td>" if bold else f"<td>{text}</td>")
        cells.append(f"<td>{_picture(row)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<h2>{html.escape(section.heading)}</h2>\n<div class="card"><table><tr><th></th>{head}<th></th></tr>\n'
        + "\n".join(lines)
        + "\n</table></div>"
    )


def _picture(row: Row) -> str:
    """The row's pictures side by side, inside the page."""
    if row.pictures is None:
        return ""
    from PIL import Image

    strip = sheet.to_bytes(row.pictures)  # (B, H, W, 3)
    count, height, width, _ = strip.shape
    image = Image.fromarray(strip.transpose(1, 0, 2, 3).reshape(height, count * width, 3))
    data = io.BytesIO()
    image.save(data, "png")
    return (
        f'<img alt="{html.escape(row.label)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'
    )
