"""The gallery of many runs: a table with thumbnails, sorted by the heading that is clicked, in one HTML file."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from sds3d.pages import html as web

STYLE = """
body { max-width: 92rem }
.card { overflow: auto; max-height: max(20rem, calc(100vh - 11rem)) }  /* its scroll bars stay within the window */
.card::-webkit-scrollbar { width: .8rem; height: .8rem }  /* shown even where others hide until they are used */
.card::-webkit-scrollbar-thumb { background: var(--soft); border: .2rem solid var(--card); border-radius: .4rem }
table { border-collapse: collapse; width: 100% }
th, td { padding: .45rem .8rem; text-align: left; border-bottom: 1px solid var(--line) }
tbody tr:last-child td { border-bottom: 0 }
tbody tr:hover { background: color-mix(in srgb, var(--accent) 6%, transparent) }
th { position: sticky; top: 0; z-index: 1; background: var(--card); white-space: nowrap; font-weight: 500 }
th button { all: unset; cursor: pointer; color: var(--soft) }
th button:hover, th button:focus-visible { color: var(--accent) }
th[aria-sort] button { color: var(--ink); font-weight: 600 }
th[aria-sort=ascending] button::after { content: " \\2191" / "" }
th[aria-sort=descending] button::after { content: " \\2193" / "" }
td { font-variant-numeric: tabular-nums; white-space: nowrap }
td.number, th.number { text-align: right }
td.name { min-width: 16rem; overflow-wrap: anywhere; white-space: normal }
td.name a { font-weight: 600; text-decoration: none }
td.name a:hover { text-decoration: underline }
td.picture { padding: .3rem 0 .3rem .8rem; width: 104px }
td img, td .none { display: block; width: 96px; height: 96px; border-radius: 6px; background: #fff; object-fit: cover }
td .none { background: var(--line) }
.status { display: block; font-size: .82rem; color: var(--bad) }
.folder { display: block; font-size: .82rem; color: var(--soft) }
@media (max-width: 40rem) {
  thead { display: block; position: sticky; top: 0; z-index: 1; background: var(--card) }
  thead tr { display: flex; flex-wrap: wrap; gap: 0 .8rem; padding: .5rem .8rem; border-bottom: 1px solid var(--line) }
  thead th { position: static; padding: 0; border: 0; font-size: .85rem }
  tbody tr td.picture { grid-column: 1 }
  tbody tr td.name { grid-column: 2; align-self: center }
}
"""

# The first click sorts text from A, numbers from the largest; a second click reverses. Empty values stay at the end.
SORT = """
const head = document.querySelector("thead tr"), body = document.querySelector("tbody");
for (const [column, th] of [...head.cells].entries()) {
  th.querySelector("button")?.addEventListener("click", () => {
    const number = th.classList.contains("number"), before = th.getAttribute("aria-sort");
    const up = before ? before === "descending" : !number;
    for (const other of head.cells) other.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[column].dataset.value;
    body.append(...[...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      return (up ? 1 : -1) * (number ? x - y : x.localeCompare(y));
    }));
  });
}
"""


@dataclass(frozen=True)
class Column:
    """A column: its heading and its number of decimals."""

    heading: str
    decimals: int = 0


@dataclass(frozen=True)
class Entry:
    """The row of a run. All text is plain.

    Args:
        title: the prompt.
        link: path of the run's page, relative to the gallery, not URL-quoted; "" for no link.
        folder: the run folder, as shown.
        words: heading -> text: method, teacher, date ...
        figures: key of a column -> number.
        picture: a thumbnail, WebP; None if there is none.
        status: why the run is broken or unfinished; "" for a finished run.
    """

    title: str
    link: str
    folder: str
    words: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    picture: bytes | None = None
    status: str = ""


def write(path: Path, title: str, entries: Sequence[Entry], columns: Mapping[str, Column]) -> Path:
    """Write the gallery. Columns in which no entry has a figure are left out. Raises ValueError if it fails."""
    words = list(dict.fromkeys(name for entry in entries for name in entry.words))
    used = {key: column for key, column in columns.items() if any(key in entry.figures for entry in entries)}
    heads = [_head("prompt")] + [_head(name) for name in words] + [_head(c.heading, "number") for c in used.values()]
    rows = "\n".join(_row(entry, words, used) for entry in entries)
    broken = sum(bool(entry.status) for entry in entries)
    count = f"{len(entries)} run{'' if len(entries) == 1 else 's'}" + (
        f", {broken} of them not finished" if broken else ""
    )
    body = (
        f'<h1>{html.escape(title)}</h1>\n<p class="soft">{count}; press a heading to sort</p>\n<div class="card">'
        f"<table><thead><tr><th></th>{''.join(heads)}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )
    return web.write(path, title, body, STYLE + web.STACKED, SORT)


def _head(text: str, kind: str = "") -> str:
    return f'<th class="{kind}"><button type="button">{html.escape(text)}</button></th>'


def _row(entry: Entry, words: Sequence[str], columns: Mapping[str, Column]) -> str:
    picture = '<span class="none"></span>'
    if entry.picture is not None:
        data = base64.b64encode(entry.picture).decode()
        picture = f'<img alt="{html.escape(entry.title)}" loading="lazy" src="data:image/webp;base64,{data}">'
    name = html.escape(entry.title)
    if entry.link:
        link = html.escape(quote(os.fsencode(entry.link)))
        name, picture = f'<a href="{link}">{name}</a>', f'<a href="{link}" tabindex="-1">{picture}</a>'
    name += f'<span class="folder">{html.escape(entry.folder)}</span>'
    if entry.status:
        name += f'<span class="status">{html.escape(entry.status)}</span>'
    cells = [f'<td class="picture">{picture}</td>', _cell(entry.title, name, "name")]
    for word in words:
        text = html.escape(entry.words.get(word, ""))
        cells.append(_cell(entry.words.get(word, ""), text, label=word))
    for key, column in columns.items():
        value = entry.figures.get(key)
        shown = "" if value is None else f"{value:,.{column.decimals}f}"
        if isinstance(value, bool):
            shown = "yes" if value else "no"
        cells.append(_cell("" if value is None else repr(float(value)), shown, "number", column.heading))
    return f"<tr>{''.join(cells)}</tr>"


def _cell(value: str, shown: str, kind: str = "", label: str = "") -> str:
    """A cell with its sort value (plain text), its content (HTML), and its heading where there is no head."""
    named = f' data-label="{html.escape(label)}"' if label else ""
    return f'<td class="{kind}" data-value="{html.escape(value)}"{named}>{shown}</td>'
