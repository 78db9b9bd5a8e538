"""Compare the time of a generator's step with that of its networks' passes.

    python scripts/generator_step.py --methods diffinstruct,vsd,dmd2

Expected: at most 1.15 times the sum of the passes, each measured alone on the same batch. The passes are forward and
backward of the generator and of the critic (once for each of the critic's fits), and forward of the generator (for each
fit), of the teacher and of the critic. DMD2 adds passes through the U-Net's encoder for the discriminator. Steps and
passes are measured alternately, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable

import torch

from sds3d.config import load as configs
from sds3d.config.load import DistillConfig
from sds3d.runs import build
from sds3d.runtime.machine import machine
from sds3d.train import train


def milliseconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begun)


def passes(teacher, batch: int, prompts: list[str]) -> dict[str, Callable[[], object]]:
    """Return the three kinds of passes of a network: forward; forward and backward; the latter of its encoder only."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((batch, *teacher.shape), generator=generator)
    t, text = torch.rand(batch, generator=generator), teacher._embed([prompts[i % len(prompts)] for i in range(batch)])
    network = copy.deepcopy(teacher.network).requires_grad_(True)

    def forward():
        with torch.no_grad():
            return network(x, t, text)

    def backward():
        network(x, t, text).square().mean().backward()

    def down(inputs: torch.Tensor = x):
        network.features(inputs, t, text)[-1].square().mean().backward()

    return {"forward": forward, "backward": backward, "down": down}


def counts(method: str, fits: int) -> dict[str, int]:
    """Return the number of passes of each kind in a step."""
    numbers = {"forward": 2 + fits, "backward": 1 + fits}
    if method == "dmd2":
        numbers["down"] = 1 + 2 * fits
    return numbers


def measure(method: str, batch: int, repeats: int) -> dict[str, float]:
    """Return the median milliseconds of a step and of its passes, and the median of their ratio."""
    layer = {"method": method, "generator.batch": batch, "steps": repeats + 3, "log.picture_every": 0}
    settings = configs.load(None, layer, kind=DistillConfig)
    teacher = build.build_teacher(settings)
    student = build.build_student(settings, teacher)
    critic = build.build_critic(settings, teacher)
    goals = build.build_objectives(build.build_objective(settings, teacher, critic), settings, student)
    alone, needed = passes(teacher, batch, student.prompts), counts(method, settings.critic.steps)
    steps, sums = [], []
    loop = train(student, goals, settings.plan(), companions={"critic": critic} if critic else {})
    for i in range(repeats + 3):
        step = milliseconds(lambda: next(loop))
        total = sum(count * milliseconds(alone[name]) for name, count in needed.items())
        if i >= 3:
            steps.append(step)
            sums.append(total)
    step, total = statistics.median(steps), statistics.median(sums)
    return {"step_ms": step, "passes_ms": total, "ratio": statistics.median(a / b for a, b in zip(steps, sums))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="diffinstruct,vsd,dmd2")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    rows = {name: measure(name, options.batch, options.repeats) for name in options.methods.split(",")}
    report = {"machine": machine(torch.device("cpu")), "methods": rows}
    if options.json:
        print(json.dumps(report, indent=1))
        return
    for name, row in rows.items():
        print(
            f"{name:14s} step {row['step_ms']:.0f} ms, its passes {row['passes_ms']:.0f} ms, ratio {row['ratio']:.3f}"
        )


if __name__ == "__main__":
    main()
