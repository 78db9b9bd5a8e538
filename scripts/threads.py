"""Measure a step's time for each wait policy of OpenMP's threads, number of threads and precision.

    python scripts/threads.py                                        the whole table, ten minutes, on an idle machine
    python scripts/threads.py --work scene,generator --seconds 8 --json

There are three kinds of work: a step of the default scene, of a one-step generator (Diff-Instruct on digits) and of a
teacher's training (digits). Each combination runs in its own process, because OpenMP reads its settings once. "default"
is the package's behaviour if the user sets nothing. It should take at most 1.3 times as long as the best combination.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

WORK = ("scene", "generator", "training")
POLICIES = ("default", "passive", "active")
PRECISIONS = ("float32", "bfloat16")
BAR = 1.3


def stepper(work: str, precision: str) -> Callable[[], object]:
    """Return a function that does one step of a kind of work."""
    import torch

    from sds3d.config import load as config
    from sds3d.config.load import Config, DistillConfig
    from sds3d.runs import build
    from sds3d.teachers.training import fit, sources
    from sds3d.teachers.training.settings import FitConfig
    from sds3d.train import train

    if work == "training":
        dtype = None if precision == "auto" else getattr(torch, precision)
        training = fit.Fit(FitConfig.usual("digits"), sources.build_source("digits", 8)[0], dtype=dtype)
        batches = training.source.batches(Path(tempfile.mkdtemp()), training.rng)
        return lambda: training.advance(batches(training.config.batch))
    layer = {"teacher.dtype": precision, "steps": 10_000, "log.picture_every": 0}
    if work == "scene":
        settings = config.load("a red mug", layer, kind=Config)
    else:
        settings = config.load(None, {**layer, "method": "diffinstruct"}, kind=DistillConfig)
    teacher = build.build_teacher(settings)
    student, critic = build.build_student(settings, teacher), build.build_critic(settings, teacher)
    objectives = build.build_objectives(build.build_objective(settings, teacher, critic), settings, student)
    loop = train(student, objectives, settings.plan(), companions={"critic": critic} if critic else {})
    return lambda: next(loop)


def measure(work: str, precision: str, threads: int, seconds: float) -> float:
    """Return the median milliseconds of the steps that fit into the time, at least two, after three warm-up steps."""
    import sds3d  # noqa: F401  before torch, whose threads it configures

    import torch  # isort: skip

    torch.set_num_threads(threads)
    step, taken = stepper(work, precision), []
    for number in itertools.count():
        begun = time.perf_counter()
        step()
        if number >= 3:
            taken.append(time.perf_counter() - begun)
        if len(taken) >= 2 and sum(taken) > seconds:
            return 1000 * statistics.median(taken)
    raise AssertionError


def in_process(work: str, precision: str, threads: int, policy: str, seconds: float) -> float:
    """Run ``measure`` in a new process."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= {"OMP_NUM_THREADS": str(threads)}
    environment |= {} if policy == "default" else {"OMP_WAIT_POLICY": policy}
    call = [sys.executable, __file__, "--one", work, precision, str(threads), "--seconds", str(seconds)]
    done = subprocess.run(call, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def table(work: list[str], precisions: list[str], seconds: float) -> list[dict[str, object]]:
    """Return a row for every combination; the first row of each kind of work is the default."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rows: list[dict[str, object]] = []
    for kind in work:
        measured: list[dict[str, object]] = []
        for precision, threads, policy in itertools.product(("auto", *precisions), sorted({cores, 1}), POLICIES):
            if precision == "auto" and (threads, policy) != (cores, "default"):
                continue
            row = {"work": kind, "precision": precision, "threads": threads, "policy": policy}
            row["ms"] = round(in_process(kind, precision, threads, policy, seconds), 1)
            measured.append(row)
            print(*row.values(), sep="  ", file=sys.stderr, flush=True)
        best = min(row["ms"] for row in measured)
        rows += [row | {"times the best": round(row["ms"] / best, 2)} for row in measured]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default=",".join(WORK), help="kinds of work, comma-separated")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="comma-separated")
    parser.add_argument("--seconds", type=float, default=5, help="how long each combination is measured")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--one", nargs=3, metavar=("WORK", "PRECISION", "THREADS"), help="one combination, in this process"
    )
    options = parser.parse_args()
    if options.one:
        work, precision, threads = options.one
        print(measure(work, precision, int(threads), options.seconds))
        return
    rows = table(options.work.split(","), options.precisions.split(","), options.seconds)
    from sds3d.runtime.machine import machine

    import torch  # isort: skip

    about = machine(torch.device("cpu"))
    if options.json:
        print(json.dumps({"machine": about, "rows": rows}, indent=1))
        return
    print(*(f"{key}: {value}" for key, value in about.items()), sep="\n")
    for row in rows:
        mark = ""
        if row["precision"] == "auto":
            mark = "  <- the default" + ("" if row["times the best"] <= BAR else ", over the bar")
        what = f"{row['work']:10s}{row['precision']:10s}{row['threads']} threads  {row['policy']:9s}"
        print(f"{what}{row['ms']:8.1f} ms{row['times the best']:7.2f}{mark}")


if __name__ == "__main__":
    main()
