"""The page of one run, in one HTML file: its models in 3D, films, progress, figures and settings."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sds3d.media import chart
from sds3d.pages import html as web

VIEWER = Path(__file__).parent / "viewer" / "viewer.min.js"

STYLE = """
.hero { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)) }
figure { margin: 0; display: flex; flex-direction: column }
figure > .view { aspect-ratio: 1; width: 100% }
.film { flex: 1; display: grid; place-items: center; background: #fff }
.film video { aspect-ratio: 1; width: 100%; display: block }
figcaption { padding: .5rem .9rem; color: var(--soft); font-size: .86rem; border-top: 1px solid var(--line) }
.view { position: relative; background: radial-gradient(circle at 50% 40%, #fff, #d9dee4) !important; cursor: grab;
  color: #1d2126; display: grid !important; place-items: center; padding: 0 }
.view canvas { display: block; touch-action: none }
.view:active { cursor: grabbing }
.wide img { display: block; width: 100%; image-rendering: auto; background: #fff }
.strip { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)) }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)) }
.plots svg { display: block; width: 100%; height: auto; padding: .5rem }
.tables { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
  align-items: start }
.facts { border-collapse: collapse; width: 100%; table-layout: fixed } /* no name narrows the figures */
.facts th, .facts td { padding: .32rem .9rem; text-align: left; border-bottom: 1px solid var(--line); font-size: .9rem;
  overflow-wrap: anywhere }
.facts tr:last-child > * { border-bottom: 0 }
.facts th { color: var(--soft); font-weight: 500; width: 60% }
.facts td { text-align: right; font-variant-numeric: tabular-nums }
h3 { font-size: .95rem; margin: 0; padding: .6rem .9rem; border-bottom: 1px solid var(--line) }
summary { cursor: pointer; padding: .7rem 1rem }
details pre { border-top: 1px solid var(--line); max-height: 34rem }
.bad { color: var(--bad) }
"""


@dataclass(frozen=True)
class RunPage:
    """The content of a run's page. All text is plain. Parts that are empty or missing are left out.

    Args:
        title: the prompt.
        line: a line of facts under the title.
        note: a warning; "" for none.
        models, films: .glb and .mp4 files, one per particle.
        film_size: pixels a side of the films.
        pictures: caption -> picture file, shown large.
        growth: step -> picture of the views at that step.
        tables: heading -> name -> value: the mesh report, scores ...
        rows: the rows of metrics.jsonl.
        config: the text of config.yaml.
        commands: commands that a user can run next.
    """

    title: str
    line: str
    note: str = ""
    models: Sequence[Path] = ()
    films: Sequence[Path] = ()
    film_size: int = 128
    pictures: Mapping[str, Path] = field(default_factory=dict)
    growth: Mapping[int, Path] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    rows: Sequence[Mapping[str, float]] = ()
    config: str = ""
    commands: Sequence[str] = ()


def write(path: Path, page: RunPage) -> Path:
    """Write the page. Raises ValueError if it cannot be written, or one of its files cannot be read."""
    head = f'<h1>{html.escape(page.title)}</h1>\n<p class="soft">{html.escape(page.line)}</p>'
    if page.note:
        head += f'\n<p class="bad">{html.escape(page.note)}</p>'
    try:
        parts = [head, _hero(page), _growth(page), _tables(page), _plots(page), _ending(page)]
        script = VIEWER.read_text(encoding="utf-8") if page.models else ""
    except OSError as error:
        raise ValueError(f"cannot read {error.filename} for {path}: {error.strerror}") from error
    return web.write(path, page.title, "\n".join(part for part in parts if part), STYLE, script)


def _hero(page: RunPage) -> str:
    """The models and films of all particles, then the large pictures."""
    figures, several = [], max(len(page.models), len(page.films)) > 1
    for i in range(max(len(page.models), len(page.films))):
        number = f"{i + 1}: " if several else ""
        for model in page.models[i : i + 1]:
            figures.append(
                f'<figure class="card"><div class="view" data-glb="glb-{i}" role="img" '
                'aria-label="the model, which can be turned">loading the model ...</div>'
                f"<figcaption>{number}drag to turn it, scroll to come nearer, double click for the front</figcaption>"
                f'<script type="text/plain" id="glb-{i}">{web.encoded(model)}</script></figure>'
            )
        for film in page.films[i : i + 1]:
            figures.append(
                f'<figure class="card"><div class="film"><video style="max-width: {2 * page.film_size}px" '
                f'autoplay loop muted playsinline controls src="{web.data_uri(film)}"></video></div>'
                f"<figcaption>{number}one turn, as the scene is rendered</figcaption></figure>"
            )
    hero = f'<div class="hero">{"".join(figures)}</div>' if figures else ""
    for caption, picture in page.pictures.items():
        text = html.escape(caption)
        hero += f'<h2>{text}</h2><figure class="card wide"><img alt="{text}" src="{web.data_uri(picture)}"></figure>'
    return hero


def _growth(page: RunPage) -> str:
    if not page.growth:
        return ""
    figures = "".join(
        f'<figure class="card wide"><img alt="views at step {step}" src="{web.data_uri(picture)}">'
        f"<figcaption>step {step}</figcaption></figure>"
        for step, picture in page.growth.items()
    )
    return f'<h2>How it grew</h2><div class="strip">{figures}</div>'


def _tables(page: RunPage) -> str:
    cards = "".join(
        f'<div class="card"><h3>{html.escape(heading)}</h3>{web.table(facts)}</div>'
        for heading, facts in page.tables.items()
        if facts
    )
    return f'<h2>Figures</h2><div class="tables">{cards}</div>' if cards else ""


def _plots(page: RunPage) -> str:
    plots = "".join(
        f'<figure class="card">{svg}<figcaption>{caption}</figcaption></figure>'
        for caption, svg in chart.curves(page.rows).items()
    )
    return f'<h2>Training</h2><div class="plots">{plots}</div>' if plots else ""


def _ending(page: RunPage) -> str:
    text = ""
    if page.commands:
        text += f'<h2>Go on</h2><div class="card"><pre>{html.escape(chr(10).join(page.commands))}</pre></div>'
    if page.config:
        text += (
            '<h2>Settings</h2><details class="card"><summary>config.yaml</summary>'
            f"<pre>{html.escape(page.config)}</pre></details>"
        )
    return text
