"""Time the hot kernels of every backend that runs on this machine.

    python scripts/bench.py                                            all kernels
    python scripts/bench.py --only hash_encode --points 65536 --json   one kernel, as JSON
    python scripts/bench.py --device cuda --points 16384,2097152 --log2-table 15,19 --dtype float16
    python scripts/bench.py --clock cpu                                CPU seconds of all threads together:
                                                                       steadier on a busy machine

The backends alternate, round by round, so that a busy moment slows all of them. A row holds the median of its rounds in
milliseconds. ``speedup`` is plain torch's forward_backward_ms divided by the row's. ``bytes`` is the least that the
forward pass reads and writes: an encoding reads eight entries a point and level, and marched samples are counted, since
there are fewer than ``points``. ``of_copy`` is the fraction of the device's copy bandwidth, measured here, that these
bytes in that time amount to.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from sds3d.ops import Backend, GridSpec, choose, reference
from sds3d.runtime.machine import machine

OPS = ("hash_encode", "hash_slope", "march", "composite")
Case = tuple[Callable, Callable | None, int]  # forward() -> state, backward(state), points or samples


def rays(count: int, device: torch.device, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Return origins and directions (R, 3) from (0, 0, 3) through a ball, the ball as a 32^3 grid, a jitter (R,)."""
    side = max(1, round(count**0.5))
    line = torch.linspace(-0.34, 0.34, side)
    y, x = torch.meshgrid(line, line, indexing="ij")
    directions = torch.nn.functional.normalize(torch.stack([x, y, -torch.ones_like(x)], -1).view(-1, 3), dim=-1)
    axis = torch.linspace(-1, 1, 32)
    squares = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2
    origins = torch.tensor([0.0, 0.0, 3.0]).expand_as(directions)
    jitter = torch.rand(side * side, generator=generator)
    return tuple(x.contiguous().to(device) for x in (origins, directions, squares < 0.5, jitter))


def hash_case(backend: Backend, points: int, spec: GridSpec, dtype: torch.dtype, device: torch.device) -> Case:
    """Encode uniform points; backward computes the table's gradient."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.rand(points, 3, generator=generator).to(device)
    table = torch.randn(spec.entries, spec.features, generator=generator).to(device, dtype).requires_grad_()
    incoming = torch.randn(points, spec.width, generator=generator).to(device, dtype)
    return (
        lambda: backend.hash_encode(positions, table, spec),
        lambda out: torch.autograd.grad(out, table, incoming),
        points,
    )


def slope_case(backend: Backend, points: int, spec: GridSpec, device: torch.device) -> Case:
    """Differentiate the features of uniform points; backward computes the table's gradient."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.rand(points, 3, generator=generator).to(device)
    table = torch.randn(spec.entries, spec.features, generator=generator).to(device).requires_grad_()
    incoming = torch.randn(points, spec.width, generator=generator).to(device)
    return (
        lambda: backend.hash_slope(positions, table, incoming, spec),
        lambda out: torch.autograd.grad(out, table, torch.ones_like(out)),
        points,
    )


def march_case(backend: Backend, points: int, device: torch.device) -> Case:
    """March the number of rays that gives about ``points`` samples."""
    origins, directions, occupancy, jitter = rays(points // 12, device, torch.Generator().manual_seed(0))
    march = partial(backend.march, origins, directions, occupancy, 0.05, jitter)
    return march, None, march().t.shape[0]


def composite_case(backend: Backend, points: int, device: torch.device) -> Case:
    """Blend colour and distance of marched samples; backward computes the gradients of density and values."""
    generator = torch.Generator().manual_seed(0)
    origins, directions, occupancy, jitter = rays(points // 12, device, generator)
    samples = reference.march(origins, directions, occupancy, 0.05, jitter)
    count = samples.t.shape[0]
    sigma = (torch.rand(count, generator=generator) * 5).to(device).requires_grad_()
    values = torch.rand(count, 4, generator=generator).to(device).requires_grad_()

    def backward(out: reference.Composite) -> None:
        torch.autograd.grad(out.accumulated.sum() + out.opacity.sum(), (sigma, values))

    return lambda: backend.composite(sigma, samples.dt, values, samples.offsets), backward, count


def bytes_of(op: str, points: int, spec: GridSpec, dtype: torch.dtype) -> int:
    """Return the bytes that an op's forward pass reads and writes for this number of points or samples."""
    if op == "hash_encode":
        return points * (12 + (8 + 1) * spec.width * dtype.itemsize)
    if op == "hash_slope":
        return points * (12 + 12 + (8 + 1) * spec.width * 4)
    if op == "march":
        return points * (8 + 12 + 4)  # ray, point and distance of each sample
    return points * (4 + 4 + 16 + 4)  # density, length, four values; the weight


def copy_bandwidth(device: torch.device, rounds: int = 5) -> float:
    """Return the bytes a second that a large copy reads and writes."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device).fill_(1)
    target, best = torch.empty_like(source), 0.0
    for _ in range(rounds):
        wait(device)
        begun = time.perf_counter()
        target.copy_(source)
        wait(device)
        best = max(best, 2 * source.numel() / (time.perf_counter() - begun))
    return best


def wait(device: torch.device) -> None:
    """Wait for the device's queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(cases: dict[str, Case], rounds: int, clock: Callable[[], float], device: torch.device) -> dict[str, list]:
    """Return the seconds (forward, backward) of each round, by backend; the first round compiles and is dropped."""
    seconds = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, (forward, backward, _) in cases.items():
            wait(device)
            start = clock()
            state = forward()
            wait(device)
            middle = clock()
            if backward is not None:
                backward(state)
                wait(device)
            if turn:
                seconds[name].append((middle - start, clock() - middle if backward else None))
    return seconds


def rows_of(op: str, points: int, seconds: dict[str, list], moved: int, bandwidth: float) -> list[dict]:
    """Return one row for each backend."""
    rows = []
    for name, turns in seconds.items():
        forward = statistics.median(a for a, _ in turns)
        backward = statistics.median(b for _, b in turns) if turns[0][1] is not None else None
        both = statistics.median(a + (b or 0) for a, b in turns)
        times = zip(("forward_ms", "backward_ms", "forward_backward_ms"), (forward, backward, both))
        row = {"op": op, "backend": name, "points": points}
        row |= {key: None if value is None else round(value * 1e3, 3) for key, value in times}
        rows.append(row | {"bytes": moved, "of_copy": round(moved / forward / bandwidth, 4)})
    plain = next((r["forward_backward_ms"] for r in rows if r["backend"] == "torch"), None)
    for row in rows:
        row["speedup"] = round(plain / row["forward_backward_ms"], 2) if plain else None
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=OPS, help="one kernel instead of all")
    parser.add_argument("--points", default="65536", help="points to encode, about as many samples to march; 1,2,3")
    parser.add_argument("--backends", default="", help="comma-separated; all that run here unless given")
    parser.add_argument("--levels", type=int, default=16)
    parser.add_argument("--features", type=int, default=2)
    parser.add_argument("--log2-table", default="17", help="one or several; matters to hash_encode")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the table")
    parser.add_argument("--finest", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", action="store_true", help="print a list of rows; the machine goes to stderr")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    dtype, bandwidth = getattr(torch, args.dtype), copy_bandwidth(device)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    rows = []
    for op in [args.only] if args.only else OPS:
        names = args.backends.split(",") if args.backends else backends_here(op, device)
        backends = [choose(device, name) for name in names]
        for log2_table in numbers(args.log2_table)[: None if op == "hash_encode" else 1]:
            spec = GridSpec(args.levels, args.features, log2_table, 16, args.finest)
            for points in numbers(args.points):
                build = {
                    "hash_encode": lambda backend, n=points, s=spec: hash_case(backend, n, s, dtype, device),
                    "hash_slope": lambda backend, n=points, s=spec: slope_case(backend, n, s, device),
                    "march": lambda backend, n=points: march_case(backend, n, device),
                    "composite": lambda backend, n=points: composite_case(backend, n, device),
                }
                cases = {backend.name: build[op](backend) for backend in backends}
                moved = bytes_of(op, next(iter(cases.values()))[2], spec, dtype)
                measured = rows_of(op, points, measure(cases, args.rounds, clock, device), moved, bandwidth)
                rows += [row | ({"log2_table": log2_table} if op == "hash_encode" else {}) for row in measured]
    about = machine(device) | {"copy_gb_s": round(bandwidth / 1e9, 1)}
    lines = [f"{key}: {value}" for key, value in about.items()] + [f"clock: {args.clock}"]
    print(*lines, sep="\n", file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print("  ".join(f"{key} {'-' if value is None else value}" for key, value in row.items()))


def numbers(text: str) -> list[int]:
    """Return the numbers of a text such as "1,2"."""
    return [int(part) for part in text.split(",")]


def backends_here(op: str, device: torch.device) -> list[str]:
    """Return the installed backends that have a kernel of their own for an op on this device."""
    own = {"torch": OPS, "numba": OPS} if device.type == "cpu" else {"torch": OPS, "triton": OPS}
    if device.type == "cuda":
        own |= {"tinycudann": ("hash_encode", "hash_slope"), "nerfacc": ("march", "composite")}
    return [name for name, ops in own.items() if op in ops and importlib.util.find_spec(name) is not None]


if __name__ == "__main__":
    main()
