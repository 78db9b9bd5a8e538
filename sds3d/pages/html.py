"""Self-contained HTML files, which load nothing from a network.

The Content-Security-Policy of a file allows only its own script, by its hash, and no requests. User text that was
escaped wrongly could therefore not run.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping
from pathlib import Path

from sds3d.runtime.files import replacing

STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5d6670; --line: #e1e4e8; --page: #fafbfc; --card: #fff;
  --accent: #0b6e5f; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #9aa4af; --line: #30363d; --page: #0f1317;
  --card: #171c22; --accent: #54c8b4; --bad: #ff8a80 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
  max-width: 76rem; padding: 2rem 1.25rem 3rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere }
h2 { font-size: 1.05rem; margin: 2rem 0 .6rem }
a { color: var(--accent) }
.soft { color: var(--soft) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden }
code, pre { font: 13px/1.5 ui-monospace, monospace }
pre { margin: 0; padding: 1rem; overflow: auto }
"""

# A table whose figures would leave a narrow screen: there, a row is a block of two columns, and each figure says what
# it is, by its attribute data-label.
STACKED = """
@media (max-width: 40rem) {
  body { padding: 1rem .75rem }
  table, tbody { display: block }
  tbody tr { display: grid; grid-template-columns: 1fr 1fr; column-gap: 1.2rem; padding: .6rem .8rem;
    border-bottom: 1px solid var(--line) }
  tbody td:not([data-label]) { grid-column: 1 / -1; min-width: 0; overflow-x: auto }
  tbody td, tbody td.number { display: flex; flex-wrap: wrap; justify-content: space-between; column-gap: .6rem;
    padding: .1rem 0; border: 0; font-size: .9rem; white-space: normal; text-align: left }
  tbody td[data-label]::before { content: attr(data-label); color: var(--soft) }
  tbody td[data-label]:empty { display: none }
}
"""


def data_uri(path: Path) -> str:
    """Return a file (.png, .jpg, .webp, .mp4) as a data URI."""
    kinds = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".mp4": "video/mp4"}
    return f"data:{kinds[path.suffix]};base64,{encoded(path)}"


def encoded(path: Path) -> str:
    """Return a file's bytes in base64."""
    return base64.b64encode(path.read_bytes()).decode()


def table(facts: Mapping[str, str]) -> str:
    """Return names and values, both plain text, as an HTML table of two columns."""
    rows = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in facts.items())
    return f'<table class="facts">{"".join(rows)}</table>'


def write(path: Path, title: str, body: str, style: str, script: str = "") -> Path:
    """Write the file.

    Args:
        path: ends in .html.
        title: plain text.
        body, style: HTML and CSS of ours, with everything that came from elsewhere escaped.
        script: JavaScript, run after the body is there.

    Raises:
        ValueError: the file cannot be written.
    """
    assert "</script" not in script.lower()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data: blob:; media-src data:; connect-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )
    with replacing(path, (".html",)) as part:
        # No newline translation: the hash is of these bytes. Names of files that are not UTF-8 are escaped.
        part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    return path
