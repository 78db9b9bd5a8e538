"""Measure the digits teacher at 1 to 35 evaluations by each sampler, and real digits against real ones as the floor.

    python scripts/digits_teacher.py --json benchmarks/digits_teacher.json --chart benchmarks/digits_teacher.png

A sampler that cannot take a number of evaluations (heun's are odd) takes the next smaller one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from sds3d.config.typed import plain
from sds3d.diffusion.samplers import SAMPLERS, Sampler
from sds3d.evaluate import generator as evaluation
from sds3d.media.chart import chart
from sds3d.runtime.machine import machine
from sds3d.teachers import small

EVALUATIONS = (1, 2, 4, 8, 18, 35)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, nargs="+", default=EVALUATIONS)
    parser.add_argument("--weights", type=Path, default=small.packaged("digits"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--chart", type=Path)
    options = parser.parse_args()
    teacher, real, rows, lines = small.load(options.weights), evaluation.Digits(), {}, {}
    floor = real.floor()
    print("real against real:", {key: round(value, 3) for key, value in floor.items()}, flush=True)
    for name in SAMPLERS:
        points = []
        for evaluations in options.evaluations:
            sampler = Sampler.within(name, evaluations)
            draw = evaluation.by_teacher(teacher, name, sampler.steps)
            row = evaluation.summary(list(evaluation.measure(draw, options.images, options.seeds, real)))
            rows[f"{name}, {sampler.evaluations} evaluations"] = row
            points.append((sampler.evaluations, row["fd_feat"].mean))
            print(name, sampler.evaluations, *(f"{key} {value}" for key, value in row.items()), flush=True)
        lines[name] = tuple(torch.tensor(column, dtype=torch.float32) for column in zip(*points))
    print(evaluation.table(rows))
    if options.json:
        report = {"floor": floor, "teacher": plain(rows), "images": options.images, "seeds": options.seeds}
        report |= {"machine": machine(torch.device("cpu")), "command": " ".join(["python", *sys.argv])}
        options.json.write_text(json.dumps(report, indent=1))
    if options.chart:
        chart(lines, options.chart, "evaluations", "FD-feat", points=True)


if __name__ == "__main__":
    main()
