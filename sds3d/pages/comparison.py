"""The page of a comparison: tables of figures and pictures, in one HTML file; and a contact sheet of the pictures.

The HTML file contains its pictures, so that it can be sent by itself.
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
@media (max-width: 40rem) { thead { display: none } td:first-child { font-weight: 600 } }
"""
WIDTH = 80  # columns of a terminal


@dataclass(frozen=True)
class Figure:
    """A column: its heading, its number of decimals, and whether larger values are better (None: no direction)."""

    heading: str
    decimals: int = 3
    more: bool | None = None


@dataclass(frozen=True)
class Row:
    """A row of a table: a label, figures by column (None and missing ones are blank), and pictures (B, 3, H, W).

    A reference row is never marked as the best of its section.
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
        title, note: plain text at the top.
        columns: the columns, in this order; the best value of a section is bold.

    Raises:
        ValueError: the page cannot be written.
    """
    body = "\n".join(_table(section, columns) for section in sections)
    top = f'<h1>{html.escape(title)}</h1>\n<p class="soft">{html.escape(note)}</p>\n'
    return web.write(path, title, top + body, STYLE + web.STACKED)


def contact_sheet(path: Path, sections: Sequence[Section]) -> Path:
    """Write only the pictures, with heading and label above each row. Raises ValueError if they cannot be written."""
    rows = [(f"{s.heading}: {r.label}", r.pictures) for s in sections for r in s.rows if r.pictures is not None]
    return sheet.contact_sheet([pictures for _, pictures in rows], path, [label for label, _ in rows])


def shown(value: float | None, column: Figure) -> str:
    """Format a figure; "" for None."""
    return "" if value is None else f"{value:.{column.decimals}f}"


def best(rows: Sequence[Row], name: str, column: Figure) -> str:
    """Return the best figure of a column as text; "" if the column has no direction or fewer than two values."""
    values = [value for row in rows if (value := row.figures.get(name)) is not None]
    if column.more is None or len(values) < 2:
        return ""
    return shown(max(values) if column.more else min(values), column)


def in_text(columns: Mapping[str, Figure], rows: Sequence[Row]) -> str:
    """Return a table for a terminal: a line for each figure, and a column for each row, its best value with a star.

    Where the columns need more than WIDTH characters, further blocks of them come below.
    """
    used = {n: c for n, c in columns.items() if any(row.figures.get(n) is not None for row in rows)}
    top = {name: best([row for row in rows if not row.reference], name, column) for name, column in used.items()}
    cells = {}
    for row in rows:
        texts = {name: shown(row.figures.get(name), column) for name, column in used.items()}
        cells[row.label] = {n: f"{text}{'*' if text and text == top[n] else ' '}" for n, text in texts.items()}
    head = max((len(column.heading) for column in used.values()), default=0)
    width = 2 + max((len(text) for label, own in cells.items() for text in (label + " ", *own.values())), default=0)
    labels, many = list(cells), max(1, (WIDTH - head) // width)
    blocks = []
    for block in (labels[i : i + many] for i in range(0, len(labels), many)):
        lines = [" " * head + "".join(f"{label} ".rjust(width) for label in block)]
        for name, column in used.items():
            lines.append(column.heading.ljust(head) + "".join(cells[label][name].rjust(width) for label in block))
        blocks.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(blocks)


def _table(section: Section, columns: Mapping[str, Figure]) -> str:
    used = {n: c for n, c in columns.items() if any(row.figures.get(n) is not None for row in section.rows)}
    candidates = [row for row in section.rows if not row.reference]
    top = {name: best(candidates, name, column) for name, column in used.items()}
    head = "".join(f"<th>{html.escape(column.heading)}</th>" for column in used.values())
    lines = []
    for row in section.rows:
        cells = [f"<td>{html.escape(row.label)}</td>"]
        for name, column in used.items():
            text = shown(row.figures.get(name), column)
            bold = text and text == top[name] and not row.reference
            label = html.escape(column.heading)
            cells.append(
                f'<td data-label="{label}"><b>{text}</b></td>' if bold else f'<td data-label="{label}">{text}</td>'
            )
        cells.append(f"<td>{_picture(row)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<h2>{html.escape(section.heading)}</h2>\n<div class="card"><table><thead><tr><th></th>{head}<th></th></tr>'
        "</thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
    )


def _picture(row: Row) -> str:
    """The row's pictures side by side, as an <img> with a data URL."""
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
