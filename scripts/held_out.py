"""Make scenes of the twelve held-out prompts with three seeds, and score them against the true shapes.

    python scripts/held_out.py --json benchmarks/held_out.json --sheet benchmarks/held_out.png
    python scripts/held_out.py --seeds 0 --out /tmp/words teacher.views=words
    python scripts/held_out.py --truth --out /tmp/ceiling domains.normals=0.3 domains.depths=0.4

No teacher was trained on these combinations of kind and colours (`sds3d.data.toybox.is_held_out`). With --out, the
runs, figures and pictures stay in a folder, and the same command goes on where it was stopped. --truth puts the true
images in the teacher's place: the ceiling of scene, recipe and export.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sds3d.config import load as config
from sds3d.data.toybox import HELD_OUT_PROMPTS
from sds3d.evaluate.true_teacher import TrueTeacher
from sds3d.evaluate.truth import MEANS, Scores
from sds3d.media.sheet import contact_sheet
from sds3d.runs import launch
from sds3d.runtime.device import pick_device
from sds3d.runtime.machine import machine

SHOWN = (1, 7, 13, 19)  # which of the 24 views the sheet shows
LIT = (0, 1, 4, 5)  # which of the 8 views in clay: two from the side, two from above
TILE = 96  # pixels a side
COUNTS = ("components", "genus", "true_components", "true_genus")  # of no interest in the mean; "topology" is

Row = dict[str, Any]  # the figures of one asset, of one prompt's assets, or of all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as for sds3d generate")
    parser.add_argument("--prompts", nargs="+", default=HELD_OUT_PROMPTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--sheet", type=Path, help="PNG of the first seed; each further one adds its number to the name"
    )
    parser.add_argument("--out", type=Path, help="keep everything in this folder, and do not make again what it has")
    parser.add_argument("--truth", action="store_true", help="let the toybox's own images be the teacher")
    options = parser.parse_args()
    if "seed" in config.parse_overrides(options.overrides):
        parser.error("give --seeds 3 4 instead of seed=3")
    with tempfile.TemporaryDirectory() as folder:
        rows = make(options, options.out or Path(folder))
    for prompt, row in rows.items():
        print(line(f"{prompt}, mean", row))
    print(line("mean", report(arguments(options), rows)["mean"]))


def make(options: argparse.Namespace, folder: Path) -> dict[str, Row]:
    """Make every asset that the folder has not yet, and write the JSON and the sheets after each of them."""
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[tuple[str, int], Row] = {}
    for seed in options.seeds:
        for prompt in options.prompts:
            stored = folder / f"{prompt.replace(' ', '-')}-{seed}.json"
            if not stored.is_file():
                teacher = TrueTeacher() if options.truth else None
                row = make_one(prompt, seed, options.overrides, folder, teacher)
                stored.write_text(json.dumps({"overrides": arguments(options), **row}, indent=1) + "\n")
            row = json.loads(stored.read_text())
            if (overrides := row.pop("overrides")) != arguments(options):
                raise SystemExit(f"{stored} was made with {overrides}; give another --out for {arguments(options)}")
            made[prompt, seed] = row
            print(line(f"{prompt}, seed {seed}", row), flush=True)
            rows = by_prompt(made)
            if options.json:
                options.json.write_text(json.dumps(report(arguments(options), rows), indent=1) + "\n")
            if options.sheet:
                name = options.sheet.name if seed == options.seeds[0] else f"{options.sheet.stem}-{seed}.png"
                stack(
                    [folder / f"{p.replace(' ', '-')}-{s}.png" for p, s in made if s == seed],
                    options.sheet.with_name(name),
                )
    return by_prompt(made)


def arguments(options: argparse.Namespace) -> list[str]:
    """Return the arguments on which the figures depend."""
    return ["--truth"] * options.truth + options.overrides


def make_one(prompt: str, seed: int, overrides: list[str], folder: Path, teacher: TrueTeacher | None) -> Row:
    """Make one asset, write its picture into the folder, and return its figures."""
    begun = time.monotonic()
    layer = config.parse_overrides(overrides)
    asset, steps = launch.start(config.load(prompt, layer, {"out": str(folder), "seed": seed}), teacher)
    for _ in steps:
        pass
    try:
        for _ in asset.finish():
            pass
    except ValueError as error:  # a scene without a surface is scored like any other
        print(f"{prompt}: {error}")
    seconds = time.monotonic() - begun
    scores = asset.evaluate()
    picture = folder / f"{prompt.replace(' ', '-')}-{seed}.png"
    rows = pictures(scores)
    labels = [f"{prompt}, seed {seed}: truth | ours", *[""] * (len(rows) - 1)]
    contact_sheet(rows, picture, labels, size=TILE)
    return {**{k: v for k, v in scores.numbers().items() if not isinstance(v, list)}, "seconds": seconds}


def pictures(scores: Scores) -> list[torch.Tensor]:
    """Return rows of true views beside ours: in colours, without light if ours have none, in clay under a light."""
    shown, lit = list(SHOWN), list(LIT)
    albedo = [] if scores.albedo is None else [torch.cat([views[shown] for views in scores.albedo])]
    coloured = torch.cat([scores.truth[shown], scores.ours[shown]])
    return [coloured, *albedo, torch.cat([scores.true_clay[lit], scores.clay[lit]])]


def stack(paths: Iterable[Path], path: Path) -> None:
    """Write pictures of one width below each other."""
    from PIL import Image

    parts = [Image.open(part).convert("RGB") for part in paths]
    sheet = Image.new("RGB", (parts[0].width, sum(part.height for part in parts)))
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    sheet.save(path)


def mean(rows: Iterable[Row]) -> Row:
    """Return the mean of each figure over the rows that have it: an asset without a mesh has no Chamfer distance.

    The mean of a figure that is true or false is the fraction of the rows where it is true.
    """
    rows = list(rows)
    known = {key: [row[key] for row in rows if row.get(key) is not None] for key in rows[0] if key not in COUNTS}
    return {key: round(sum(values) / len(values), 4) if values else None for key, values in known.items()}


def by_prompt(made: dict[tuple[str, int], Row]) -> dict[str, Row]:
    """Return the mean of each prompt, with the rows of its seeds under "seeds"."""
    seeds: dict[str, dict[str, Row]] = {}
    for (prompt, seed), row in made.items():
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        seeds.setdefault(prompt, {})[str(seed)] = rounded
    return {prompt: {**mean(rows.values()), "seeds": rows} for prompt, rows in seeds.items()}


def report(overrides: list[str], rows: dict[str, Row]) -> dict[str, Any]:
    """Return the figures so far with command and machine."""
    every = [row for prompt in rows.values() for row in prompt["seeds"].values()]
    return {
        "command": " ".join(["python scripts/held_out.py", *overrides]),
        "machine": machine(pick_device("auto")),
        "assets": len(every),
        "mean": mean(every),
        "prompts": rows,
    }


def line(name: str, row: Row) -> str:
    """Return the figures of a row as one line."""
    figures = [f"{key} {'-' if row.get(key) is None else f'{float(row[key]):.4g}'}" for key in (*MEANS, "seconds")]
    if "components" in row:
        figures.append("components {components} ({true_components})  genus {genus} ({true_genus})".format(**row))
    return f"{name:40s} {'  '.join(figures)}"


if __name__ == "__main__":
    main()
