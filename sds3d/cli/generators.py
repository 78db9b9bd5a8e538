"""Commands about few-step generators: train one, draw images with it, evaluate it."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Context, Option

from sds3d.cli.options import spread
from sds3d.cli.shared import DType, Json, Overrides, Quiet, RunOptions, begin, print_result, user_path


@dataclass(frozen=True)
class DistillOptions(RunOptions):
    """The flags of distill, each a shorthand for a setting."""

    prompt: Annotated[str | None, Option(help="learn this prompt only, not all the teacher was trained on")] = None
    prompts: Annotated[str | None, Option(help="a text file of prompts to learn, one a line")] = None
    steps_of_generator: Annotated[
        int | None, Option("--sampling-steps", help="steps in which the generator draws, 1 to 8")
    ] = None
    fsdp: Annotated[bool, Option("--fsdp", help="shard the weights over torchrun's processes")] = False

    def own(self) -> dict[str, Any]:
        """See `sds3d.cli.shared.RunOptions.own`."""
        own = {"prompt": self.prompt, "generator.prompts": self.prompts, "fsdp": self.fsdp or None}
        return own | {"generator.steps": self.steps_of_generator}


@spread
def distill(context: Context, overrides: Overrides = None, options: DistillOptions = DistillOptions()) -> None:
    """Train a generator that draws in one step, or a few, what its teacher draws in many.

    Writes generator.safetensors and grid.png. If the teacher is a diffusers pipeline, writes a diffusers pipeline with
    its own scheduler instead of generator.safetensors.

    Methods: diffinstruct (the default), vsd, dmd (makes pairs first, once), dmd2 (also needs real images).

    [bold]Examples[/bold]

      sds3d distill --teacher digits --method diffinstruct      [dim]# minutes on a CPU[/dim]

      sds3d distill --teacher digits --method dmd2 --sampling-steps 2 steps=4000

      sds3d distill --teacher toybox --method dmd -o outputs/toy      [dim]# a GPU, or patience[/dim]

      sds3d distill --teacher FOLDER --prompts prompts.txt --method vsd generator.batch=4 method.scale=4.5
      optim.lr.generator=1e-5 critic.lr=1e-5      [dim]# a diffusers pipeline[/dim]

      torchrun --nproc-per-node 2 -m sds3d distill --teacher digits      [dim]# --fsdp shards the weights, too[/dim]

    Ctrl-C stops after the current step and saves; [bold]sds3d resume[/bold] goes on.
    """
    from sds3d.config.load import DistillConfig

    begin(context, None, overrides, options, DistillConfig)


@dataclass(frozen=True)
class SampleOptions:
    """The flags of sample."""

    number: Annotated[int, Option("-n", "--number", min=1, max=4096, help="how many images of each prompt")] = 8
    steps: Annotated[
        int | None, Option(min=1, max=8, help="sampling steps, at most those it was trained for, the default")
    ] = None
    seed: Annotated[int, Option(min=0, max=2**62 - 1, help="seed of the noise")] = 0
    dtype: DType = "auto"
    out: Annotated[Path, Option("--out", "-o", help="a .png or .jpg", parser=user_path)] = Path("grid.png")
    quiet: Quiet = False
    json: Json = False


@spread
def sample(
    generator: Annotated[
        Path, Argument(metavar="RUN", help="a run folder of distill, or the generator saved in it", parser=user_path)
    ],
    prompts: Annotated[list[str] | None, Argument(metavar="[PROMPT]...", help="what to draw; a few by default")] = None,
    options: SampleOptions = SampleOptions(),
) -> None:
    """Draw images with a generator that distill has trained, one row per prompt.

    [bold]Example[/bold]

      sds3d sample outputs/00001-digits-diffinstruct "a handwritten seven" "a handwritten two" -n 16 -o grid.png
    """
    from sds3d.media import sheet
    from sds3d.runs.generator import a_few, load_generator, rows_of

    o, loaded = options, load_generator(generator, dtype=options.dtype)
    prompts = prompts or a_few(loaded.prompts)
    begun = time.perf_counter()
    images = loaded(list(prompts) * o.number, o.seed, o.steps)
    seconds = time.perf_counter() - begun
    path = sheet.contact_sheet(rows_of(images, len(prompts)), o.out, prompts, sheet.seen(images))
    if not (o.quiet or o.json):
        rate = len(images) / seconds
        print(f"{len(images)} images in {o.steps or loaded.steps} step(s), {rate:.0f} a second", file=sys.stderr)
    print_result({"files": [str(path)], "images": len(images), "seconds": round(seconds, 4)}, [str(path)], o.json)


def is_one(run: Path) -> bool:
    """Return whether a folder or file holds a generator."""
    from sds3d.runs.generator import find

    return find(run) is not None


def evaluate(run: Path, number: int, seeds: int, fid: bool, quiet: bool, json: bool, dtype: str | None = None) -> None:
    """Evaluate a generator and its teacher. Prints a table; writes eval.json and eval.png beside the generator."""
    from sds3d.config.typed import plain
    from sds3d.evaluate import generator as evaluation

    def note(who: str, seed: int, row: dict[str, float]) -> None:
        if not (quiet or json):
            figures = "  ".join(f"{key} {value:.3f}" for key, value in row.items())
            print(f"{who}, seed {seed + 1} of {seeds}: {figures}", file=sys.stderr, flush=True)

    report = evaluation.judge_generator(run, number, seeds, note, fid, dtype)
    if not (quiet or json):
        print(evaluation.table(report.rows), file=sys.stderr)
    print_result({**plain(report.figures), "files": report.files}, report.files, json)
