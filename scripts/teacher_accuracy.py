"""Measure how often the packaged teacher draws what a held-out caption says, judged by a small classifier.

    python scripts/teacher_accuracy.py --images 400 --json benchmarks/teacher_accuracy.json

    python scripts/teacher_accuracy.py --captions trained --guidance 1.5,2,3 --images 90      which guidance is best

The classifier (scripts/train_judge.py) was trained on true renders in all colours, including the held-out ones. Its own
accuracy is measured on fresh true renders of the same captions and views, and printed beside the teacher's. A sample is
right if its kind, its main colour and, if the toy has one, its second colour are right.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sds3d.cameras import Cameras
from sds3d.data import toybox
from sds3d.data.kinds import KINDS, STACKS
from sds3d.evaluate.classifiers import ToyJudge
from sds3d.media.sheet import contact_sheet
from sds3d.prompts import COLOURS
from sds3d.runtime.machine import machine
from sds3d.teachers import small
from sds3d.teachers.base import VIEWS
from sds3d.teachers.drawing import sample

NAMES, PAINTS = list(KINDS | STACKS), list(COLOURS)


def draw(teacher: small.SmallTeacher, cases: list[Case], guidance: float) -> list[Tensor]:
    """Return one sample (1, 3, 64, 64) for each case."""
    cameras = [case.camera if teacher.views == "camera" else None for case in cases]
    return [sample(teacher, [case.caption], i, guidance, cameras[i]) for i, case in enumerate(cases)]


@dataclass
class Case:
    """A caption, its toy, and a camera."""

    caption: str
    toy: toybox.Toy
    camera: Cameras


def draw_cases(count: int, held_out: bool, generator: torch.Generator) -> list[Case]:
    """Return captions with random cameras, taking all kinds and stacks in turn.

    Args:
        count: number of cases.
        held_out: whether the combinations of colours are held out from training, or are not.
    """
    cases = []
    for n in range(count):
        name = NAMES[n % len(NAMES)]
        kind = (KINDS | STACKS)[name]
        pairs = [
            (m, s)
            for m in PAINTS
            for s in PAINTS
            if (kind.second or s == m) and toybox.is_held_out(name, m, s) == held_out
        ]
        main, second = pairs[int(torch.randint(len(pairs), (), generator=generator))]
        article = "an" if main[0] in "aeiou" else "a"
        if name in STACKS:
            upper, lower = name.split(" on ")
            caption = f"{article} {main} {upper} on a {second} {lower}".replace("a orange", "an orange")
        else:
            caption = f"{article} {main} {name}"
            if kind.second:
                caption += f" with a {second} {kind.second}".replace("a orange", "an orange")
        place = torch.rand(2, generator=generator)
        camera = Cameras(place[:1] * 360, place[1:] * 45, torch.tensor([3.0]), torch.tensor([40.0]))
        cases.append(Case(caption, toybox.parse(caption), camera))
    return cases


def judge(reader: ToyJudge, images: Tensor, cases: list[Case]) -> list[dict[str, bool]]:
    """Return what is right in each of the images (N, 3, 64, 64): kind, main, second colour if there is one, all."""
    verdicts = []
    for (kind, main, second), case in zip(reader.classify(images).tolist(), cases, strict=True):
        right = {"kind": reader.kinds[kind] == case.toy.name, "main": reader.colours[main] == case.toy.main}
        if case.toy.kind.second:
            right["second"] = reader.colours[second] == case.toy.second
        verdicts.append(right | {"all": all(right.values())})
    return verdicts


def accuracy(verdicts: list[dict[str, bool]]) -> dict[str, float]:
    """Return the fraction of right images for each property, of the images that have it."""
    having = {key: [v[key] for v in verdicts if key in v] for key in ("kind", "main", "second", "all")}
    return {key: sum(values) / len(values) for key, values in having.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a teacher; the packaged one by default")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--guidance", default="2", help="one scale, or several, comma-separated")
    parser.add_argument("--captions", choices=("held-out", "trained"), default="held-out")
    parser.add_argument("--views", default="camera", choices=VIEWS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="PNG of the first 64 samples")
    options = parser.parse_args()

    begun, reader = time.monotonic(), ToyJudge()
    cases = draw_cases(options.images, options.captions == "held-out", torch.Generator().manual_seed(2))
    on_truth = judge(reader, torch.cat([case.toy.render(case.camera)[0] for case in cases]), cases)
    teacher = small.load(options.weights, views=options.views)
    drawn, judged = [], {}
    for guidance in map(float, options.guidance.split(",")):
        drawn = draw(teacher, cases, guidance)
        verdicts = judge(reader, torch.cat(drawn), cases)
        readable = [v for v, t in zip(verdicts, on_truth, strict=True) if t["all"]]
        judged[guidance] = accuracy(verdicts) | {
            "all, where the judge reads the true render": accuracy(readable)["all"]
        }
        print(f"guidance {guidance}: {judged[guidance]}", file=sys.stderr, flush=True)
    result = {
        "classifier_on_true_renders": accuracy(on_truth),
        "teacher": judged if len(judged) > 1 else judged[guidance],
        "images": len(cases),
        "captions": options.captions,
        "views": options.views,
        "guidance": options.guidance,
        "seconds": round(time.monotonic() - begun),
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(teacher.device),
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.sheet:
        contact_sheet([torch.cat(drawn[i : i + 8]) for i in range(0, min(64, len(drawn) - 7), 8)], options.sheet)


if __name__ == "__main__":
    main()
