"""Commands that make pictures, films and pages of finished runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from sds3d.cli.options import spread
from sds3d.cli.shared import Json, Quiet, RunFolder, finite, print_result, user_path
from sds3d.runtime.ranges import shown

if TYPE_CHECKING:
    from sds3d.runs.scene import Asset

SHEET = "png"
FORMATS = ("mp4", "gif", "webp", SHEET)
COLUMNS = 8  # views per row of a contact sheet


@dataclass(frozen=True)
class ViewOptions:
    """The views of a turntable film or a contact sheet."""

    size: Annotated[int, Option(min=16, max=4096, help="pixels a side of each view")] = 256
    frames: Annotated[int | None, Option(min=1, max=10_000, help="views in a turn; default 96, on a sheet 8")] = None
    elevation: Annotated[float, Option(min=-90, max=90, callback=finite, help="degrees above the horizon")] = 15.0
    fps: Annotated[int, Option(min=1, max=240, help="frames per second")] = 24

    def count(self, suffix: str) -> int:
        """Return the number of views in a turn."""
        return (COLUMNS if suffix == SHEET else 96) if self.frames is None else self.frames


@spread
def render(
    run: RunFolder,
    what: Annotated[
        list[str] | None,
        Option("--what", "-w", help="rgb (default), opacity, depth or normals; comma-separated: side by side"),
    ] = None,
    format: Annotated[str, Option("--format", "-f", help="mp4, gif, webp (one turn), png (a contact sheet)")] = "mp4",
    out: Annotated[
        Path | None, Option("--out", "-o", help="folder to write to; the run's own by default", parser=user_path)
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
    options: ViewOptions = ViewOptions(),
) -> None:
    """Render films and contact sheets of a run's scene; by default turntable.mp4.

    MP4 is H.264 with yuv420p, which every player and browser shows. Opacity: white is solid. Depth: bright is near.
    Normals: 0.5 n + 0.5 in world axes, red +x, green +y (up), blue +z (the front).

    [bold]Examples[/bold]

      sds3d render outputs/00001-a-red-mug --size 512

      sds3d render outputs/00001-a-red-mug --what rgb,depth,normals      [dim]# side by side, in one film[/dim]

      sds3d render outputs/00001-a-red-mug -w depth -w normals -f gif,png      [dim]# four files[/dim]

      sds3d render outputs/00001-a-red-mug -f png --frames 24 --elevation 40 -o sheets
    """
    from sds3d.media import video
    from sds3d.runs.scene import Asset
    from sds3d.students import render_layers

    groups, formats = [_parts(names) for names in what or ["rgb"]], _parts(format)
    joined = [",".join(names) for names in groups]
    for option, values in (("format", formats), ("what", joined), *(("what", names) for names in groups)):
        twice = [value for value in values if values.count(value) > 1]
        if twice:  # both would be written to one file
            raise ValueError(f"{option} has {twice[0]} twice; give it once")
    for names in groups:
        render_layers.check(names)
    for suffix in formats or [""]:
        if suffix not in FORMATS:
            raise ValueError(f"format is {shown(suffix)}; give one or more of {', '.join(FORMATS)}")
        if suffix != SHEET:
            video.check(f"x.{suffix}", options.size, options.count(suffix), options.fps)
    asset, files = Asset.open(run), []
    for particle in asset.particles:
        for names in groups:
            for suffix in formats:
                tag = "" if names == ["rgb"] else "-" + "-".join(names)
                name = particle.file(f"{'sheet' if suffix == SHEET else 'turntable'}{tag}.{suffix}").name
                files.append(str(_draw(particle, names, (out or particle.path) / name, options, quiet or json)))
    if (out or asset.path).resolve() == asset.path.resolve():
        asset.write_page()
    print_result({"run": str(asset.path), "files": files}, files, json)


def gallery(
    folder: Annotated[
        Path, Argument(metavar="[FOLDER]", help="a folder of runs; subfolders count, too", parser=user_path)
    ] = Path("outputs"),
    json: Json = False,
) -> None:
    """Write FOLDER/index.html, a page with thumbnails and figures of many runs.

    It opens from disk, without a network. A click on a heading sorts the runs. Each run links to its own page. Broken
    and unfinished runs are marked. Scores are shown for runs that sds3d eval has evaluated.

    [bold]Examples[/bold]

      sds3d gallery outputs

      sds3d gallery outputs/methods/runs
    """
    from sds3d.runs import report

    path, entries = report.write_gallery(folder)
    broken = sum(bool(entry.status) for entry in entries)
    print_result({"files": [str(path)], "runs": len(entries), "unfinished": broken}, [str(path)], json)


def _parts(text: str) -> list[str]:
    """ "a, .B" -> ["a", "b"]"""
    return [part.strip().lower().lstrip(".") for part in text.split(",") if part.strip()]


def _draw(asset: Asset, names: list[str], path: Path, options: ViewOptions, quiet: bool) -> Path:
    """Write one film, or one sheet. Raises ValueError if it cannot be written."""
    import torch

    from sds3d.cameras import Cameras
    from sds3d.media import sheet, video
    from sds3d.runs import progress
    from sds3d.students import render_layers

    suffix = path.suffix.lower()[1:]
    count = options.count(suffix)

    def view(cameras: Cameras) -> torch.Tensor:
        return torch.cat(list(render_layers.layers(asset.scene, cameras, options.size, names).values()), -1)

    frames = progress.counted(video.turn(view, count, options.elevation), count, path.name, quiet)
    if suffix != SHEET:
        return video.film(frames, path, options.fps)
    wide = torch.stack([torch.from_numpy(frame).permute(2, 0, 1) / 255 for frame in frames])
    tiles = [tile.split(COLUMNS) for tile in wide.split(options.size, -1)]  # by layer, then by row
    rows = [row for layer_rows in zip(*tiles) for row in layer_rows]
    labels = names * len(tiles[0]) if len(names) > 1 else None
    return sheet.contact_sheet(rows, path, labels)
