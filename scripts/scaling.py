"""Plot time and memory against size on log-log axes, to see whether the time grows faster than the work.

    python scripts/scaling.py --out benchmarks             scaling.png and scaling.json
    python scripts/scaling.py --device cuda --out benchmarks

points: the encoding of points, forward and backward in the table. pixels: a step of a scene without its teacher
(render, backward, Adam) with one view. entries a level: the same step against the size of the hash table. A slope is
fitted to the upper half of each line, where launch overhead is negligible. It should be at most 1.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from sds3d import ops
from sds3d.config.load import load
from sds3d.media.chart import chart
from sds3d.ops import GridSpec
from sds3d.runs.scene_parts import build_scene
from sds3d.runtime.machine import machine
from sds3d.train import make_optimiser


def encoding(points: int, device: torch.device, backend: str = "auto", levels: int = 16) -> Callable[[], None]:
    """Return a function that runs one forward and backward of the hash encoding."""
    generator, spec = torch.Generator().manual_seed(0), GridSpec(levels, 2, 17, 16, 512)
    kernels = ops.choose(device, backend)
    positions = torch.rand(points, 3, generator=generator).to(device)
    table = torch.randn(spec.entries, 2, generator=generator).to(device).requires_grad_()
    incoming = torch.randn(points, spec.width, generator=generator).to(device)
    return lambda: torch.autograd.grad(kernels.hash_encode(positions, table, spec), table, incoming)


def scene_step(resolution: int, log2_table: int, device: torch.device) -> Callable[[], None]:
    """Return a function that runs one step of a scene, with a gradient of ones instead of a teacher's."""
    layer = {"device": str(device), "render.resolution": resolution, "render.views": 1, "field.log2_table": log2_table}
    settings = load("a red mug", layer)
    student, generator = build_scene(settings, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    optimiser, count = make_optimiser(student, settings.optim), iter(range(10**9))

    def step() -> None:
        number = next(count)
        images = student.draw(number, generator).images
        optimiser.zero_grad(set_to_none=True)
        images.backward(torch.ones_like(images))
        optimiser.step()
        student.after_step(number, generator)

    return step


def cost(work: Callable[[], None], device: torch.device, rounds: int) -> dict[str, float]:
    """Return the median milliseconds and the peak MiB."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    work()  # compiles
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, on Linux
    seconds = []
    for _ in range(rounds):
        wait()
        begun = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - begun)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        status = Path("/proc/self/status").read_text()
        peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**10
    return {"ms": 1e3 * statistics.median(seconds), "peak_mb": peak}


def sweeps(device: torch.device) -> Iterator[tuple[str, int, Callable[[], None]]]:
    """Yield (line, size, work), the smallest size of a line first."""
    large = device.type == "cuda"
    for power in range(12, 23 if large else 20):
        yield "points", 2**power, encoding(2**power, device)
    for side in (32, 64, 128, 256, 512) if large else (32, 64, 128, 256):
        yield "pixels", side**2, scene_step(side, 15, device)
    for power in range(13, 23 if large else 20):
        yield "entries a level", 2**power, scene_step(64, power, device)


def slope(sizes: list[int], values: list[float]) -> float:
    """Return the slope of the upper half on log-log axes, by least squares."""
    half = len(sizes) // 2
    x, y = ([math.log(v) for v in row[half:]] for row in (sizes, values))
    return statistics.linear_regression(x, y).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of both files")
    options = parser.parse_args()
    device, lines = torch.device(options.device), {}
    for name, size, work in sweeps(device):
        measured = cost(work, device, options.rounds)
        lines.setdefault(name, []).append({"size": size, **measured})
        print(f"{name} {size}: {measured['ms']:.2f} ms, {measured['peak_mb']:.0f} MB", file=sys.stderr, flush=True)
    report = {"machine": machine(device), "command": " ".join(["python", *sys.argv]), "lines": lines, "slopes": {}}
    drawn = {}
    for name, rows in lines.items():
        sizes, times = [row["size"] for row in rows], [row["ms"] for row in rows]
        report["slopes"][name] = round(slope(sizes, times), 3)
        label = f"{name}: slope {report['slopes'][name]:.2f}"
        drawn[label] = (torch.tensor(sizes), torch.tensor(times))
    kernels = ops.choose(device).name
    options.out.mkdir(parents=True, exist_ok=True)
    chart(drawn, options.out / "scaling.png", "size", f"milliseconds ({kernels})", points=True)
    memory = {
        name: tuple(torch.tensor([r[k] for r in rows]) for k in ("size", "peak_mb")) for name, rows in lines.items()
    }
    chart(memory, options.out / "scaling_memory.png", "size", "peak MB of the process", points=True)
    (options.out / "scaling.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["slopes"]))


if __name__ == "__main__":
    main()
