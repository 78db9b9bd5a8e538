"""Commands that make, resume, export and judge scenes."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from sds3d.cli.live import LiveOptions
from sds3d.cli.options import optional_flags, spread
from sds3d.cli.shared import (
    AllowPickle,
    Json,
    Overrides,
    Quiet,
    RunFolder,
    RunOptions,
    begin,
    carry_out,
    dump,
    make_display,
    print_result,
    user_path,
)
from sds3d.export.settings import MeshConfig
from sds3d.runtime.ranges import shown

if TYPE_CHECKING:
    from sds3d.live.watch import Watch


@dataclass(frozen=True)
class GenerateOptions(LiveOptions, RunOptions):
    """The flags of generate, each a shorthand for a setting."""

    teacher_views: Annotated[str | None, Option(help="camera (exact) or words (front, side, back view)")] = None
    backend: Annotated[str | None, Option(help="kernels: auto, numba, torch ... (see sds3d doctor)")] = None

    def own(self) -> dict[str, Any]:
        """See `sds3d.cli.shared.RunOptions.own`."""
        return {"teacher.views": self.teacher_views, "backend": self.backend}

    def watched(self) -> AbstractContextManager[Watch | None]:
        """See `sds3d.cli.shared.RunOptions.watched`."""
        return self.page(silent=self.quiet or self.json)


@spread
def generate(
    context: Context,
    prompt: Annotated[str, Argument(help='what to make, in quotes, as in "a red mug with a white handle"')],
    overrides: Overrides = None,
    options: GenerateOptions = GenerateOptions(),
) -> None:
    """Make a 3D asset from a prompt. Writes mesh.glb, turntable.mp4 and preview.png into a new folder under outputs/.

    [bold]Examples[/bold]

      sds3d generate "a red mug"

      sds3d generate "a blue chair" --method sds --seed 3 steps=800 render.resolution=64

      sds3d generate "a green cube on a yellow cylinder" --dry-run

      sds3d generate "a red mug" --live      [dim]# and open the page it names[/dim]

    Ctrl-C stops after the current step and saves; [bold]sds3d resume[/bold] goes on. With --live the page is served
    until Ctrl-C, even after the run (with --quiet or --json, until the run ends). SDS3D_TRACEBACK=1 shows the traceback
    of an error.
    """
    from sds3d.config.load import Config

    begin(context, prompt, overrides, options, Config)


@dataclass(frozen=True)
class ResumeOptions(LiveOptions):
    """The flags of resume."""

    allow_pickle: AllowPickle = False
    quiet: Quiet = False
    json: Json = False


@spread
def resume(
    context: Context,
    run: RunFolder,
    overrides: Overrides = None,
    options: ResumeOptions = ResumeOptions(),
) -> None:
    """Resume a run where it stopped, and finish it.

    [bold]Examples[/bold]

      sds3d resume outputs/00001-a-red-mug

      sds3d resume outputs/00001-a-red-mug steps=800      [dim]# longer than it was meant to be[/dim]

      sds3d resume outputs/00001-a-red-mug export.size=256      [dim]# a finished run: its files again[/dim]

      sds3d resume outputs/00001-a-red-mug --live      [dim]# watched in a browser (scenes)[/dim]
    """
    from sds3d.config import load as configs
    from sds3d.runs import launch
    from sds3d.runs.folder import Run
    from sds3d.runtime import distributed

    begun, quiet, json = time.perf_counter(), options.quiet, options.json
    layer = configs.parse_overrides(overrides or []) | ({configs.PICKLE: True} if options.allow_pickle else {})
    options.require()
    if options.live and configs.of_run(Run.open(run).config).MAKES != "scene":
        raise ValueError(f"--live shows scenes, and {run} is none; leave it out")
    result, steps = launch.resume(run, layer, context.obj)
    display = make_display(quiet or distributed.join().rank > 0, json)
    with options.page(silent=quiet or json) as watch:
        carry_out(result, steps, begun, display, json, watch)


_MeshFlags = optional_flags(MeshConfig)


@dataclass(frozen=True)
class MeshOptions(_MeshFlags):
    """The flags of export: one for each setting of ``export.mesh``, and the orientation and height of the mesh."""

    up: Annotated[str | None, Option(help="the axis that points up, y or z; y in glb and obj, z in ply and stl")] = None
    height: Annotated[float | None, Option(help="of the mesh: in mm for stl (100), in metres otherwise (1)")] = None

    def check(self, formats: list[str]) -> None:
        """Raise ValueError if meshes of these formats cannot have this orientation and height."""
        from sds3d.export.model import STANDS, stand

        for suffix in formats:
            stand(f".{suffix}", self.up, self.height)
        if self.height is not None and len({STANDS[f".{suffix}"].unit for suffix in formats}) > 1:
            raise ValueError(
                f"height is {self.height:g}, in mm for stl and in metres for the others; write stl in a call of its own"
            )

    def changed(self) -> dict[str, Any]:
        """Return the settings of ``export.mesh`` that were given."""
        values = {f.name: getattr(self, f.name) for f in fields(MeshConfig)}
        return {name: value for name, value in values.items() if value is not None}


@spread
def export(
    run: RunFolder,
    format: Annotated[str, Option("--format", "-f", help="glb, obj, ply, stl (mesh), mp4 (turntable), png")] = "glb",
    out: Annotated[
        Path | None, Option("--out", "-o", help="folder to write to; the run's own by default", parser=user_path)
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
    options: MeshOptions = MeshOptions(),
) -> None:
    """Write a run's asset in other formats, and compare each mesh with renders of the scene.

    Meshes stand on the ground. GLB and OBJ are one metre high, with +y up and the front at +z. PLY is one metre high,
    with +z up and the front at -y, as in Blender. STL, for slicers, is 100 millimetres high with +z up. --up and
    --height change this. The other flags replace the run's settings export.mesh.*, as its config.yaml has them, for
    this call. The report is in the run's mesh.json, and in the GLB.

    [bold]Examples[/bold]

      sds3d export outputs/00001-a-red-mug --format glb,obj,ply,stl

      sds3d export outputs/00001-a-red-mug --resolution 256 --texture 2048 --faces 20000

      sds3d export outputs/00001-a-red-mug -f stl --height 80      [dim]# 80 mm high, to print[/dim]
    """
    from sds3d.runs import progress
    from sds3d.runs.scene import FORMATS, Asset
    from sds3d.runtime.files import require_folder

    names = {"mp4": "turntable", "png": "preview"}
    suffixes = [part.strip().lower().lstrip(".") for part in format.split(",") if part.strip()]
    for suffix in suffixes or [""]:
        if f".{suffix}" not in FORMATS:
            raise ValueError(f"format is {shown(suffix)}; give one or more of {', '.join(f[1:] for f in FORMATS)}")
        if suffixes.count(suffix) > 1:
            raise ValueError(f"format has {suffix} twice; give it once")
    meshes = [suffix for suffix in suffixes if suffix not in names]
    options.check(meshes)
    flags = [*options.changed(), *(name for name in ("up", "height") if getattr(options, name) is not None)]
    if flags and not meshes:
        raise ValueError(f"--{flags[0]} applies to meshes, and {format} has none; leave it out")
    asset, files, reports, lines = Asset.open(run), [], {}, []
    require_folder(out or asset.path)  # before the work
    with progress.parts(quiet or json) as tell:
        for particle in asset.particles:
            exporter = particle.exporter(tell, options.up, options.height, **options.changed())
            for suffix in suffixes:
                path = (out or particle.path) / particle.file(f"{names.get(suffix, 'mesh')}.{suffix}").name
                files.append(str(path))
                if suffix in names:
                    particle.export(path)
                else:
                    reports[str(path)] = particle.write_mesh(exporter, path)
            lines += [f"warning: {text}" for text in exporter.shortfalls()] if quiet or json else exporter.lines()
    if (out or run).resolve() == run.resolve():
        asset.write_page()
    for line in lines:
        print(line, file=sys.stderr)
    print_result({"run": str(run), "files": files, "meshes": reports}, files, json)


def evaluate(
    runs: Annotated[list[Path], Argument(metavar="RUN...", help="one run folder or more", parser=user_path)],
    number: Annotated[
        int, Option("-n", "--number", min=2, max=1_000_000, help="for generators: images per seed")
    ] = 5000,
    seeds: Annotated[int, Option(min=1, max=1000, help="for generators: number of seeds")] = 3,
    fid: Annotated[bool, Option("--fid", help="for generators: also FID (pip install sds3d\\[fid])")] = False,
    dtype: Annotated[
        str | None, Option(help="for generators: dtype of it and its teacher; the run's by default")
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Evaluate runs: scenes against the toybox's true shapes, generators against held-out real images.

    Scenes get IoU, PSNR, Chamfer distance, F-scores at 0.05 and 0.02, the mean cosine of the normals, the depth error,
    the number of pieces and handles (genus), and eval.png, with the mesh in clay under a light. The PSNR is that of lit
    views; where the colours are albedo, the toybox's light falls on them, and they get a PSNR without it, too.
    Generators of digits or toys get FD-feat and its ratio to the teacher's, KID-feat, class accuracy, precision,
    recall, copies and speed, each ± its standard deviation over the seeds, with eval.json and eval.png. With fewer
    images than are held out (596 digits) they get only KID-feat, class accuracy, copies and speed.

    [bold]Examples[/bold]

      sds3d eval outputs/00001-a-red-mug

      sds3d eval outputs/00002-digits-diffinstruct -n 2000 --seeds 1
    """
    from sds3d.cli import generators
    from sds3d.runs.scene import Asset

    for run in list(runs):
        if generators.is_one(run):
            generators.evaluate(run, number, seeds, fid, quiet, json, dtype)
            runs.remove(run)
        elif dtype is not None:
            raise ValueError(f"--dtype is for generators, and {run} is none")
    if not runs:
        return
    rows = []
    for asset in [particle for run in runs for particle in Asset.open(run).particles]:
        scores = asset.evaluate().numbers()
        rows.append({"run": str(asset.path), "prompt": asset.config.prompt, "particle": asset.particle, **scores})
        if not json:
            print(score_lines(asset.config.prompt, scores))
    if json:
        print(dump(rows if len(rows) > 1 else rows[0]))
        return
    if len(rows) > 1:
        from sds3d.evaluate.truth import MEANS

        figures = [[row[key] for row in rows if row[key] is not None] for key in MEANS]
        means = [sum(values) / len(values) if values else None for values in figures]
        print(score_lines(f"mean of {len(rows)}", dict(zip(MEANS, means, strict=True))))


def score_lines(name: str, scores: dict[str, Any]) -> str:
    """Return the scores of a scene, or their means, in lines of at most 80 columns."""
    albedo = "" if scores["psnr_albedo"] is None else f" (albedo {scores['psnr_albedo']:.2f} dB)"
    chamfer = "no mesh" if scores["chamfer"] is None else f"{scores['chamfer']:.4f}"
    if "components" in scores:
        handles = "not closed" if scores["genus"] is None else f"genus {scores['genus']}"
        shape = (
            f"pieces {scores['components']}, {handles} (true {scores['true_components']}, genus {scores['true_genus']})"
        )
    else:  # a mean
        shape = f"as the truth's {100 * scores['topology']:.0f} %"
    return "\n".join(
        [
            name,
            f"  views     IoU {scores['iou']:.3f}  PSNR {scores['psnr']:.2f} dB{albedo}",
            f"  surface   F {scores['fscore']:.3f}  F at 0.02 {scores['fscore_fine']:.3f}  "
            f"normals {scores['normals']:.3f}  Chamfer {chamfer}",
            f"  depth     depth error {scores['depth_error']:.3f}  missed {scores['missed']:.3f}",
            f"  topology  {shape}",
        ]
    )
