"""Measure the cost of a live page without viewers: two runs alternate their steps, and one of them has a page.

python scripts/live_cost.py --steps 60
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

from sds3d.config import load as configs
from sds3d.live.address import Address
from sds3d.live.stage import Stage
from sds3d.live.watch import Watch
from sds3d.runs import launch


def timed(step: Callable[[], object]) -> tuple[float, float]:
    """Return the wall seconds and the CPU seconds (of all threads) of one step."""
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of both runs")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = ["log.picture_every=0", *given.overrides, f"out={folder}"]
        config = configs.load("a red mug", configs.parse_overrides(overrides), kind=configs.Config)
        (_, plain), (asset, live) = launch.start(config), launch.start(config)
        stage = Stage(Address.find(), "cost")
        watch = Watch(stage)
        watch.begin(asset)
        pair = (lambda: next(plain)), (lambda: watch.update(next(live), lambda: False))
        for _ in range(2):  # kernels are compiled, files are opened
            for step in pair:
                step()
        rows = []  # wall and CPU seconds of the plain step, then of the live one
        for i in range(given.steps):
            first, second = pair if i % 2 else pair[::-1]
            times = timed(first), timed(second)
            rows.append(sum(times if i % 2 else times[::-1], ()))
        step = next(live)
        calls = 10_000
        alone, _ = timed(lambda: [watch.update(step, lambda: False) for _ in range(calls)])
        stage.close()
        plain.close()
        live.close()
    columns = list(zip(*rows, strict=True))
    for name, k in (("wall", 0), ("CPU", 1)):
        without, served = (1 / statistics.mean(columns[k + shift]) for shift in (0, 2))
        print(f"steps a second of {name}: {without:.2f} without, {served:.2f} with the page")
    print(f"the page's own part of a step: {alone / calls * 1e6:.1f} microseconds")


if __name__ == "__main__":
    main()
