"""HTML pages made from the files of run folders: a page for one run, and a gallery of many runs."""

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
LABELS = {  # figure -> its name on pages; others keep their own names
    "iou": "silhouette IoU",
    "psnr": "PSNR, dB",
    "psnr_albedo": "PSNR of the albedo, dB",
    "chamfer": "Chamfer",
    "fscore": "F-score at 0.05",
    "fscore_fine": "F-score at 0.02",
    "normals": "normals, mean cosine",
    "depth_error": "depth error, scene units",
    "missed": "fraction of the true pixels missed",
    "components": "pieces",
    "genus": "handles (genus)",
    "true_components": "pieces of the truth",
    "true_genus": "handles of the truth",
    "topology": "closed, with the truth's pieces and handles",
}
MESH_LABELS = {  # the same for mesh.json, which compares the mesh with the scene that it was made from
    "version": "made by sds3d",
    "light_baked": "its colours hold light and shade",
    "vertices": "vertices",
    "faces": "triangles",
    "watertight": "watertight",
    "components": "separate pieces",
    "iou": "silhouettes beside the scene's, IoU",
    "psnr": "pictures beside the scene's, PSNR in dB",
    "psnr_covered": "the same without the background, dB",
    "depth": "depths beside the scene's, mean difference in scene units",
    "dent": "the same, mean over the worst patch",
    "normals": "normals beside the scene's, mean cosine",
    "behind": "fraction of the pictures that shows faces from behind",
}
# Entries of mesh.json that the page leaves out: details of the extraction, and what the page shows elsewhere.
INTERNAL = {"level", "level_iou", "scale", "up", "unit"}
SHOWN_ELSEWHERE = {"prompt", "method", "teacher", "seed", "particle"}

# Errors of one run's damaged files. They do not stop the gallery of the other runs.
DAMAGE = (OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError)
THUMBNAIL = 192  # pixels a side
COLUMNS = {  # the columns of a gallery: from metrics.jsonl, eval.json and mesh.json
    "step": gallery.Column("steps"),
    "seconds": gallery.Column("seconds"),
    "memory": gallery.Column("memory, MB"),
    "iou": gallery.Column("IoU", 3),
    "psnr": gallery.Column("PSNR, dB", 1),
    "chamfer": gallery.Column("Chamfer", 3),
    "fscore": gallery.Column("F at 0.05", 2),
    "fscore_fine": gallery.Column("F at 0.02", 2),
    "normals": gallery.Column("normals", 2),
    "depth_error": gallery.Column("depth error", 3),
    "topology": gallery.Column("topology"),
    "mesh faces": gallery.Column("faces"),
    "mesh watertight": gallery.Column("watertight"),
    "mesh iou": gallery.Column("mesh IoU", 3),
    "mesh psnr": gallery.Column("mesh PSNR, dB", 1),
}


@dataclass(frozen=True)
class PageFacts:
    """The content of the pages of one kind of run.

    Args:
        pictures: caption -> name of a file in the run folder; files that are missing are left out.
        commands: commands that a user can run next; {run} is the folder, {twice} two times the run's steps.
        film_size: (config) -> pixels a side of the turntable film; 0 if the kind has no film.
    """

    pictures: Mapping[str, str]
    commands: tuple[str, ...]
    film_size: Callable[[Any], int] = lambda config: 0


def write_page(run: Run, content: PageFacts, note: str = "") -> Path:
    """Write the run's index.html from the files in its folder.

    Args:
        content: the content of the run's kind.
        note: a warning to show, such as an error at the run's end; "" for none.

    Raises:
        ValueError: the config cannot be read, or the page cannot be written.
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
    """Write index.html into a folder, a gallery of all runs in it and in the folders below it, the newest first.

    Returns:
        The path of the page, and its entries. Broken and unfinished runs are listed and marked as such.

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
    """The gallery's entry of a run, in whatever state the run is."""
    path = run.path.relative_to(folder).as_posix()
    link = f"{path}/{PAGE}" if (run.path / PAGE).is_file() else f"{path}/"
    title, words, status, columns = run.path.name, {"method": "", "made": "", "date": date(run)}, "", {}
    try:
        rows = figures(run)
        config = configs.of_run(Run.open(run.path).config)
    except DAMAGE as error:
        status = f"broken: {textwrap.shorten(str(error), 200)}"
    else:
        title = config.prompt or run.path.name
        words |= {"method": configs.name_of(config.method), "made": config.MAKES}
        if rows:
            columns = {key: rows[-1][key] for key in ("step", "seconds", "memory") if key in rows[-1]}
        if columns.get("step", 0) < config.steps:
            status = f"unfinished: {columns.get('step', 0)} of {config.steps} steps"
    for name, prefix in (("eval.json", ""), ("mesh.json", "mesh ")):
        for key, value in flat(_json(run, name)).items():
            column = prefix + key.rpartition(" ")[2]
            if column in COLUMNS and _is_number(value):
                columns.setdefault(column, value)
    return gallery.Entry(title, link, path, words, columns, _thumbnail(run), status)


def _thumbnail(run: Run) -> bytes | None:
    """The first view of the preview, or of the newest readable progress picture, as a small WebP; None for neither."""
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
    """Return the rows of metrics.jsonl, with their finite numbers only."""
    return [{k: v for k, v in row.items() if _is_number(v)} for row in run.rows()]


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def summary(config: RunConfig, rows: list[dict[str, float]]) -> str:
    """Describe a run in a line, as in "scene by sds from teacher small, seed 0, 400 steps in 4 min 20 s"."""
    method = configs.name_of(config.method)
    text = f"{config.MAKES} by {method} from teacher {config.teacher.short_name}, seed {config.seed}"
    if rows:
        text += f", {rows[-1]['step']} steps in {duration(rows[-1].get('seconds', 0))}"
    return text


def date(run: Run) -> str:
    """Return the time of the run's last step, or of its beginning, as in "2026-11-23 16:09"."""
    newest = next(path for path in (run.metrics, run.config, run.path) if path.exists())
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(newest.stat().st_mtime))


def duration(seconds: float) -> str:
    """Format a duration, as in "4 min 20 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def facts(run: Run, name: str) -> dict[str, str]:
    """Return the values of a JSON file as label -> text. Nested keys become "outer inner"; lists are left out."""
    return {LABELS.get(key, key.replace("_", " ")): _shown(value) for key, value in flat(_json(run, name)).items()}


def mesh_facts(run: Run) -> dict[str, str]:
    """Return the values of mesh.json as label -> text; a file's value is listed only if it differs from the mesh's."""
    values, lines = flat(_json(run, "mesh.json")), {}
    for key, value in values.items():
        section, _, figure = key.rpartition(" ")
        if (section == "mesh" or section.startswith("files ")) and figure in INTERNAL or key in SHOWN_ELSEWHERE:
            continue
        if not section or section == "mesh":
            lines[MESH_LABELS.get(figure, figure.replace("_", " "))] = _shown(value)
        elif not section.startswith("files "):
            lines[key.replace("_", " ")] = _shown(value)
        elif value != values.get(f"mesh {figure}"):
            lines[f"{section.removeprefix('files ')}: {MESH_LABELS.get(figure, figure)}"] = _shown(value)
    return lines


def _json(run: Run, name: str) -> Any:
    """The content of a JSON file of a run; {} if it is missing or cannot be read."""
    path = run.own(name)
    try:
        return {} if path is None else from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def flat(values: Any, above: str = "") -> dict[str, Any]:
    """Flatten nested mappings: {"a": {"b": 1}} -> {"a b": 1}. Lists and None are left out."""
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
    """The same file of every particle: mesh.glb, mesh-2.glb, mesh-3.glb."""
    names = {1: f"{stem}{suffix}"}
    for path in run.path.glob(f"{stem}-*{suffix}"):
        if number := re.fullmatch(rf"{stem}-(\d+)", path.stem):
            names[int(number[1])] = path.name
    return [path for _, name in sorted(names.items()) if (path := run.own(name)) is not None]
