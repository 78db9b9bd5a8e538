"""What a run folder tells, read from its files alone: a page for one run, and a gallery of many."""

from __future__ import annotations

import io
import math
import re
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sds3d.config import load as configs
from sds3d.config.schema import RunConfig
from sds3d.pages import gallery
from sds3d.pages import run as run_page
from sds3d.runs.folder import Run, open_picture
from sds3d.runtime.files import from_json

PAGE = "index.html"
KNOWN = {  # how figures are named on pages; others keep their own names
    "iou": "silhouette IoU",
    "psnr": "PSNR, dB",
    "chamfer": "Chamfer",
    "fscore": "F-score at 0.05",
}
MESH = {  # the same of mesh.json, whose comparison is with the scene that the mesh was made from
    "version": "made by sds3d",
    "light_baked": "its colours hold light and shade",
    "vertices": "vertices",
    "faces": "triangles",
    "watertight": "watertight",
    "components": "separate pieces",
    "iou": "silhouettes beside the scene's, IoU",
    "psnr": "pictures beside the scene's, PSNR in dB",
    "psnr_covered": "the same without the background, dB",
}
INTERNAL = {
    "level",
    "level_iou",
    "scale",
    "up",
    "unit",
}  # of mesh.json: how the surface was found, and how it stands in the file
SAID_ABOVE = {"prompt", "method", "teacher", "seed", "particle"}  # of mesh.json: what the page says elsewhere

DAMAGE = (OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError)  # of one run's
# files, which never ends the page of the others
THUMBNAIL = 192  # pixels a side
COLUMNS = {  # the figures of a gallery: of the run, of eval.json, of mesh.json
    "step": gallery.Column("steps"),
    "seconds": gallery.Column("seconds"),
    "memory": gallery.Column("memory, MB"),
    "iou": gallery.Column("IoU", 3),
    "psnr": gallery.Column("PSNR, dB", 1),
    "chamfer": gallery.Column("Chamfer", 3),
    "fscore": gallery.Column("F-score", 2),
    "mesh faces": gallery.Column("faces"),
    "mesh watertight": gallery.Column("watertight"),
    "mesh iou": gallery.Column("mesh IoU", 3),
    "mesh psnr": gallery.Column("mesh PSNR, dB", 1),
}


@dataclass(frozen=True)
class PageFacts:
    """What the pages of one kind of run show.

    Args:
        pictures: caption -> file in the run folder, of those that may be there.
        commands: what can be done next; {run} is the folder, {twice} two times the run's steps.
        film_size: (config) -> pixels a side of its films; 0 where it has none.
    """

    pictures: Mapping[str, str]
    commands: tuple[str, ...]
    film_size: Callable[[Any], int] = lambda config: 0


def write_page(run: Run, content: PageFacts, note: str = "") -> Path:
    """Write the run's index.html, from what is in its folder.

    Args:
        content: of its kind.
        note: what went wrong at the run's end, if anything.

    Raises:
        ValueError: the config cannot be read, or the place cannot be written.
    """
    config = configs.of_run(run.config)
    rows = figures(run)
    tables = {"Mesh": mesh_facts(run), "Scores": facts(run, "eval.json")}
    page = run_page.RunPage(
        title=config.prompt or run.path.name,
        line=f"{summary(config, rows)}; {date(run)}",
        note=note,
        models=_numbered(run, "mesh", ".glb"),
        films=_numbered(run, "turntable", ".mp4"),
        film_size=content.film_size(config),
        pictures={text: path for text, name in content.pictures.items() if (path := run.own(name)) is not None},
        growth={int(path.stem): path for path in run.spread(8)},
        tables=tables,
        rows=rows,
        config=run.config.read_text(encoding="utf-8"),
        commands=[text.format(run=run.path, twice=2 * config.steps) for text in content.commands],
    )
    return run_page.write(run.path / PAGE, page)


def write_gallery(folder: str | Path) -> tuple[Path, list[gallery.Entry]]:
    """Write index.html into a folder: all the runs in it and in the folders below it, the newest first.

    Returns:
        The page, and what it lists; runs that are broken or unfinished are there, and say so.

    Raises:
        ValueError: there is no such folder, it is a run itself, it holds no runs, or it cannot be written.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give one that holds runs, such as outputs")
    if (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is a run; its page is its {PAGE}. Give the folder of runs: {folder.parent}")
    runs = [path for path in folder.rglob("[0-9]*-*") if path.is_dir() and re.match(r"\d{5,}-", path.name)]
    if not runs:
        raise ValueError(f"{folder} holds no runs (folders such as 00001-a-red-mug); give the folder that does")
    entries = sorted((_entry(Run(path), folder) for path in runs), key=lambda e: e.words["date"], reverse=True)
    return gallery.write(folder / PAGE, f"Runs in {folder.resolve().name}", entries, COLUMNS), entries


def _entry(run: Run, folder: Path) -> gallery.Entry:
    """A run of a gallery, whatever state it is in."""
    place = run.path.relative_to(folder).as_posix()
    link = f"{place}/{PAGE}" if (run.path / PAGE).is_file() else f"{place}/"
    title, words, status, found = run.path.name, {"method": "", "made": "", "date": date(run)}, "", {}
    try:
        rows = figures(run)
        config = configs.of_run(Run.open(run.path).config)
    except DAMAGE as error:
        status = f"broken: {textwrap.shorten(str(error), 200)}"
    else:
        title = config.prompt or run.path.name
        words |= {"method": configs.name_of(config.method), "made": config.MAKES}
        if rows:
            found = {key: rows[-1][key] for key in ("step", "seconds", "memory") if key in rows[-1]}
        if found.get("step", 0) < config.steps:
            status = f"unfinished: {found.get('step', 0)} of {config.steps} steps"
    for name, prefix in (("eval.json", ""), ("mesh.json", "mesh ")):
        for key, value in flat(_json(run, name)).items():
            column = prefix + key.rpartition(" ")[2]
            if column in COLUMNS and _is_number(value):
                found.setdefault(column, value)
    return gallery.Entry(title, link, place, words, found, _thumbnail(run), status)


def _thumbnail(run: Run) -> bytes | None:
    """The first view of the preview, or of the newest progress picture, small; None where no picture can be read."""
    for path in filter(None, [run.own("preview.png"), *reversed(run.pictures())]):
        try:
            picture = open_picture(path)
        except ValueError:
            continue
        side = min(picture.size)
        small, data = picture.crop((0, 0, side, side)).resize((THUMBNAIL, THUMBNAIL)), io.BytesIO()
        small.save(data, "webp", quality=80)
        return data.getvalue()
    return None


def figures(run: Run) -> list[dict[str, float]]:
    """The rows of metrics.jsonl; only their numbers."""
    return [{k: v for k, v in row.items() if _is_number(v)} for row in run.rows()]


def _is_number(value: Any) -> bool:
    """Whether it can be shown as a figure."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def summary(config: RunConfig, rows: list[dict[str, float]]) -> str:
    """As in "scene by sds from teacher small, seed 0, 400 steps in 4 min 20 s"."""
    method = configs.name_of(config.method)
    text = f"{config.MAKES} by {method} from teacher {Path(config.teacher.name).stem}, seed {config.seed}"
    if rows:
        text += f", {rows[-1]['step']} steps in {duration(rows[-1].get('seconds', 0))}"
    return text


def date(run: Run) -> str:
    """When its last step was done, or when it was begun, as in "2026-11-23 16:09"."""
    newest = next(path for path in (run.metrics, run.config, run.path) if path.exists())
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(newest.stat().st_mtime))


def duration(seconds: float) -> str:
    """As in "4 min 20 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def facts(run: Run, name: str) -> dict[str, str]:
    """Named figures of a JSON file as text, inner ones as "outer inner"; lists are left out."""
    return {KNOWN.get(key, key.replace("_", " ")): _shown(value) for key, value in flat(_json(run, name)).items()}


def mesh_facts(run: Run) -> dict[str, str]:
    """What mesh.json tells, each thing once: what a check found of a file only where it differs from the mesh."""
    values, found = flat(_json(run, "mesh.json")), {}
    for key, value in values.items():
        place, _, figure = key.rpartition(" ")
        if (place == "mesh" or place.startswith("files ")) and figure in INTERNAL or key in SAID_ABOVE:
            continue
        if not place or place == "mesh":
            found[MESH.get(figure, figure.replace("_", " "))] = _shown(value)
        elif not place.startswith("files "):
            found[key.replace("_", " ")] = _shown(value)
        elif value != values.get(f"mesh {figure}"):
            found[f"{place.removeprefix('files ')}: {MESH.get(figure, figure)}"] = _shown(value)
    return found


def _json(run: Run, name: str) -> Any:
    """What a JSON file of a run holds; nothing if it is not there or not to be read."""
    path = run.own(name)
    try:
        return {} if path is None else from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def flat(values: Any, above: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a b": 1}, without lists and without None."""
    if not isinstance(values, Mapping):
        return {} if values is None or isinstance(values, list) or not above else {above: values}
    return {
        name: value for key, inner in values.items() for name, value in flat(inner, f"{above} {key}".strip()).items()
    }


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _numbered(run: Run, stem: str, suffix: str) -> list[Path]:
    """mesh.glb, mesh-2.glb, mesh-3.glb: the same file of every particle."""
    found = {1: f"{stem}{suffix}"}
    for path in run.path.glob(f"{stem}-*{suffix}"):
        if number := re.fullmatch(rf"{stem}-(\d+)", path.stem):
            found[int(number[1])] = path.name
    return [path for _, name in sorted(found.items()) if (path := run.own(name)) is not None]
