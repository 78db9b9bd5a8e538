"""Measure how a step's time divides into student, networks and distillation core, for each method.

    python scripts/overhead.py                                     scenes, the recipes' settings, every method
    python scripts/overhead.py --methods sds,vsd --steps 40 --json

The core's time is an objective's time without its networks' forwards: noise, weights, guidance, arithmetic, metrics. It
should be less than 5 % of the step. "rest" is the loop's bookkeeping.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from sds3d.config import load as config
from sds3d.distill.score import METHODS
from sds3d.networks.text import TextEncoder
from sds3d.networks.unet import UNet
from sds3d.runs import build
from sds3d.runtime.machine import machine
from sds3d.train import train


class Stopwatch:
    """Seconds spent in wrapped functions, by label.

    Time in a nested wrapped call counts for the inner label only. A critic's fit is the exception: all of its time
    counts for "critic".
    """

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.inside: list[str] = []

    @contextmanager
    def watch(self, owner: Any, name: str, label: str):
        """Time every call of ``owner.name`` inside the block."""
        original = getattr(owner, name)
        setattr(owner, name, self.timed(original, label))
        yield
        setattr(owner, name, original)

    def timed(self, function: Callable, label: str) -> Callable:
        def call(*arguments, **named):
            if self.inside[-1:] == ["critic"]:
                return function(*arguments, **named)
            self.inside.append(label)
            begun = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                took = time.perf_counter() - begun
                self.inside.pop()
                self.seconds[label] += took
                if self.inside:
                    self.seconds[self.inside[-1]] -= took

        return call


def step_shares(method: str, steps: int, prompt: str) -> dict[str, float]:
    """Return the milliseconds a step, by part, of a scene's ``steps`` steps after as many warm-up steps."""
    layer = {"method": method, "steps": 2 * steps, "log.picture_every": 0}
    settings = config.load(prompt, layer)
    teacher, student = build.build_teacher(settings), build.build_student(settings)
    critic = build.build_critic(settings, teacher)
    objective, watch = build.build_objective(settings, teacher, critic), Stopwatch()
    with (
        watch.watch(student, "draw", "student"),
        watch.watch(student, "regularisers", "student"),
        watch.watch(student, "after_step", "occupancy"),
        watch.watch(torch.Tensor, "backward", "student"),
        watch.watch(torch.optim.Adam, "step", "optimiser"),
        watch.watch(UNet, "forward", "networks"),
        watch.watch(TextEncoder, "forward", "networks"),
        watch.watch(critic, "fit", "critic") if critic else nullcontext(),
    ):
        objectives = {objective.name: watch.timed(objective, "core")}
        begun = 0.0
        companions = {"critic": critic} if critic else {}
        for step in train(student, objectives, settings.plan(), companions=companions):
            if step.step == steps:
                watch.seconds.clear()
                begun = time.perf_counter()
        total = time.perf_counter() - begun
    parts = dict(watch.seconds)
    parts["rest"] = total - sum(parts.values())
    return {name: 1000 * value / steps for name, value in {"step": total, **parts}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    able = [name for name, kind in METHODS.items() if not {"source", "pairs", "real"} & set(kind.NEEDS)]
    parser.add_argument("--methods", default=",".join(able), help="comma-separated names")
    parser.add_argument("--steps", type=int, default=30, help="measured steps, after as many warm-up steps")
    parser.add_argument("--prompt", default="a red mug")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    rows = {name: step_shares(name, args.steps, args.prompt) for name in args.methods.split(",")}
    if args.json:
        print(json.dumps({"machine": machine(torch.device("cpu")), "milliseconds_a_step": rows}, indent=1))
        return
    print(*(f"{key}: {value}" for key, value in machine(torch.device("cpu")).items()), sep="\n")
    for name, parts in rows.items():
        shares = "  ".join(f"{key} {value:.1f}" for key, value in parts.items())
        print(f"{name:8s}{shares}  ms a step; core {parts['core'] / parts['step']:.1%}")


if __name__ == "__main__":
    main()
