"""Commands about methods: list them, paint with them, compare them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from sds3d.cli.shared import Json, Overrides, Quiet, carry_out, dump, make_display
from sds3d.options import spread


@dataclass(frozen=True)
class PaintOptions:
    """The flags of paint, each short for a key."""

    method: Annotated[str | None, Option(help="how to distil; sds3d methods lists them")] = None
    number: Annotated[int | None, Option("--number", "-n", help="how many images")] = None
    start: Annotated[str | None, Option(help="a picture to begin from; grey without one")] = None
    seed: Annotated[int | None, Option(help="of every random draw")] = None
    teacher: Annotated[str | None, Option(help="a packaged teacher (small), or a file of weights")] = None
    out: Annotated[str | None, Option("--out", "-o", help="folder for run folders")] = None
    config: Annotated[Path | None, Option(help="a YAML file of settings, such as another run's config.yaml")] = None
    dry_run: Annotated[bool, Option("--dry-run", help="print the settings and stop")] = False
    quiet: Quiet = False
    json: Json = False

    def layer(self) -> dict[str, Any]:
        """The settings given by flags."""
        given = {key: getattr(self, key) for key in ("method", "seed", "out")}
        given |= {"teacher.name": self.teacher, "image.count": self.number, "image.start": self.start}
        return {key: value for key, value in given.items() if value is not None}


@spread
def paint(
    prompt: Annotated[str, Argument(help='what to paint; view words count, as in "a red mug, side view"')],
    overrides: Overrides = None,
    options: PaintOptions = PaintOptions(),
) -> None:
    """Optimise images directly, without a scene: what a method does, seen in seconds.

    Writes image.png, images/1.png ... and progress/strip.png into a new folder under outputs/.

    [bold]Examples[/bold]

      sds3d paint "a red mug, side view" --method vsd

      sds3d paint "a red mug" --method nfsd -n 8 method.scale=5 steps=400

      sds3d paint "a blue mug" --method dds --start outputs/00001-a-red-mug/images/1.png source.prompt="a red mug"
    """
    from sds3d import config as configs
    from sds3d import launch

    begun = time.perf_counter()
    layers = options.layer(), configs.parse_overrides(overrides or [])
    config = configs.load(prompt, *layers, file=options.config, kind=configs.PaintConfig)
    if options.dry_run:
        launch.check(config)
        print(configs.to_yaml(config), end="")
        return
    painting, steps = launch.start(config)
    carry_out(painting, steps, begun, make_display(options.quiet, options.json), options.json)


def methods(json: Json = False) -> None:
    """List the distillation methods, what each needs, its settings and its paper.

    [bold]Example[/bold]

      sds3d methods
    """
    from dataclasses import fields

    from sds3d.distill import METHODS
    from sds3d.typed import plain

    rows = []
    for name, kind in METHODS.items():
        text, _, paper = (kind.__doc__ or "").partition("\n")[0].partition("arXiv ")
        settings = {f"method.{f.name}": plain(getattr(kind(), f.name)) for f in fields(kind)}
        title, paper = text.rpartition(" (")[0], paper.partition(",")[0].rstrip("):. ")
        rows.append({"name": name, "title": title, "paper": paper, "needs": list(kind.NEEDS), "settings": settings})
    if json:
        print(dump(rows))
        return
    for row in rows:
        needs = f"; needs a {', '.join(row['needs'])}" if row["needs"] else ""
        settings = " ".join(f"{key}={value}" for key, value in row["settings"].items())
        print(f"{row['name']:8s}{row['title']} (arXiv {row['paper']}){needs}\n        {settings}")
