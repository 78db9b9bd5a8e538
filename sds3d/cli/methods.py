"""Commands about methods: list them, paint with them, compare them."""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Context, Option

from sds3d.cli.options import spread
from sds3d.cli.shared import AllowPickle, Json, Overrides, Quiet, RunOptions, begin, dump, print_result, user_path


@dataclass(frozen=True)
class PaintOptions(RunOptions):
    """The flags of paint, each a shorthand for a setting."""

    number: Annotated[int | None, Option("--number", "-n", help="how many images")] = None
    start: Annotated[str | None, Option(help="a picture to begin from; grey without one")] = None

    def own(self) -> dict[str, Any]:
        """See `sds3d.cli.shared.RunOptions.own`."""
        return {"image.count": self.number, "image.start": self.start}


@spread
def paint(
    context: Context,
    prompt: Annotated[str, Argument(help='what to paint; view words count, as in "a red mug, front view"')],
    overrides: Overrides = None,
    options: PaintOptions = PaintOptions(),
) -> None:
    """Optimise images directly, without a scene. This shows in seconds what a method does.

    Writes image.png, images/1.png ... and progress/strip.png into a new folder under outputs/.

    [bold]Examples[/bold]

      sds3d paint "a red mug, front view" --method vsd

      sds3d paint "a red mug" --method nfsd -n 8 method.scale=5 steps=400

      sds3d paint "a blue mug" --method dds --start outputs/00001-a-red-mug/images/1.png source.prompt="a red mug"
    """
    from sds3d.config.load import PaintConfig

    begin(context, prompt, overrides, options, PaintConfig)


@dataclass(frozen=True)
class CompareOptions:
    """The flags of compare."""

    methods: Annotated[str, Option(help="names, comma-separated; sds3d methods lists them")] = "sds,nfsd,csd,vsd"
    seeds: Annotated[str, Option(help="seeds, comma-separated: a run for each")] = "0"
    student: Annotated[str, Option(help="image (pixels) or scene")] = "image"
    negative: Annotated[str | None, Option(help="what not to make, as in 'blurry, ugly'")] = None
    allow_pickle: AllowPickle = False
    held_out: Annotated[bool, Option("--held-out", help="add the toybox's 12 held-out prompts")] = False
    out: Annotated[Path, Option("--out", "-o", help="folder; a second call continues it", parser=user_path)] = Path(
        "outputs/compare"
    )
    quiet: Quiet = False
    json: Json = False


@spread
def compare(
    context: Context,
    prompts: Annotated[
        list[str] | None, Argument(metavar="PROMPT... [KEY=VALUE]...", help="prompts and settings")
    ] = None,
    options: CompareOptions = CompareOptions(),
) -> None:
    """Compare methods on the same prompts, seeds, steps and teacher.

    Writes index.html (one page with all pictures), sheet.png and results.json, and prints the means.

    Figures against the toybox's object: IoU, PSNR, Chamfer distance, F-scores at 0.05 and 0.02, mean cosine of the
    normals, depth error, and topology, the fraction of the meshes that are closed and have the true pieces and handles
    (for images, the PSNR to its most similar true view). Colour off: distance of the mean colour from that of the
    teacher's samples. Saturation off: mean saturation minus that of the samples. Diversity: mean difference between
    seeds, also for pictures averaged to 8 x 8, which removes noise. Seconds, teacher evaluations and peak memory of a
    run.

    [bold]Examples[/bold]

      sds3d compare "a red mug" --methods sds,nfsd,csd,vsd

      sds3d compare "a mug" "a red car" --methods sds,vsd --student scene --seeds 0,1 steps=200
    """
    from sds3d.config import load as configs
    from sds3d.config.typed import convert
    from sds3d.evaluate import comparison as comparing
    from sds3d.runs.progress import Clock

    arguments = prompts or []
    texts = [text for text in arguments if "=" not in text]
    negative = [] if options.negative is None else [f"negative={options.negative}"]
    if options.held_out:
        from sds3d.data.toybox import HELD_OUT_PROMPTS

        texts += HELD_OUT_PROMPTS
    comparison = comparing.Comparison(
        tuple(dict.fromkeys(texts)),
        tuple(part.strip() for part in options.methods.split(",") if part.strip()),
        tuple(
            convert(int, configs.parse_overrides([f"seed={part}"])["seed"], "seeds")
            for part in options.seeds.split(",")
        ),
        options.student,
        configs.parse_overrides([*negative, *(text for text in arguments if "=" in text)])
        | ({configs.PICKLE: True} if options.allow_pickle else {}),
        context.obj,
    )
    clock, begun, entries = Clock(), time.perf_counter(), []
    total = len(comparison.prompts) * len(comparison.methods) * len(comparison.seeds)
    for entry in comparing.compare(comparison, options.out):
        entries.append(entry)
        if not (options.quiet or options.json):
            rate = clock.rate(len(entries), time.perf_counter() - begun)
            left = f"  {(total - len(entries)) / rate / 60:.0f} min left" if rate else ""
            print(f"run {len(entries)}/{total}{left}  {entry.line()}", file=sys.stderr, flush=True)
    if not (options.quiet or options.json):
        print(comparing.in_text(entries), file=sys.stderr)
    files = [str(options.out / name) for name in ("index.html", "sheet.png", "results.json")]
    print_result({"files": files, "mean": comparing.summary(entries)}, files, options.json)


def methods(json: Json = False) -> None:
    """List the distillation methods with their papers, their needs and their settings.

    [bold]Example[/bold]

      sds3d methods
    """
    from dataclasses import fields

    from sds3d.config.recipes import recipe
    from sds3d.config.typed import plain
    from sds3d.distill.score import METHODS

    rows = []
    for name, kind in METHODS.items():
        line = (kind.__doc__ or "").partition("\n")[0]
        (paper,) = re.findall(r"arXiv (\d{4}\.\d{5})", line)[:1]
        title = line.partition(" (")[0]
        method: Any = kind()  # every method is a dataclass
        values = {f.name: plain(getattr(method, f.name)) for f in fields(method)} | recipe(name).get("method", {})
        settings = {f"method.{key}": value for key, value in values.items() if key != "name"}
        rows.append({"name": name, "title": title, "paper": paper, "needs": list(kind.NEEDS), "settings": settings})
    if json:
        print(dump(rows))
        return
    for row in rows:
        needs = f"; needs a {', '.join(row['needs'])}" if row["needs"] else ""
        settings = " ".join(f"{key}={value}" for key, value in row["settings"].items())
        print(f"{row['name']:14s}{row['title']} (arXiv {row['paper']}){needs}\n{'':14s}{settings}")
