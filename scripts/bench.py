"""Time the hot kernels of every backend that runs here, and say on which machine.

    python scripts/bench.py                                            all of them
    python scripts/bench.py --only hash_encode --points 65536 --json   one, for a program to read
    python scripts/bench.py --clock cpu                                CPU seconds of all threads together:
                                                                       steadier where others use the machine

Backends take turns, round by round, so that a busy moment hits all of them; a row holds the median of its
rounds in milliseconds. ``speedup`` is plain torch's forward_backward_ms over the row's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from sds3d.doctor import machine
from sds3d.ops import Backend, GridSpec, choose, reference

OPS = ("hash_encode", "march", "composite")
Case = tuple[Callable, Callable | None]  # forward() -> state, backward(state)


def rays(count: int, device: torch.device, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Rays (R, 3) from (0, 0, 3) through a ball, the ball as a 32^3 grid, and a jitter (R,)."""
    side = max(1, round(count**0.5))
    line = torch.linspace(-0.34, 0.34, side)
    y, x = torch.meshgrid(line, line, indexing="ij")
    directions = torch.nn.functional.normalize(torch.stack([x, y, -torch.ones_like(x)], -1).view(-1, 3), dim=-1)
    axis = torch.linspace(-1, 1, 32)
    squares = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2
    origins = torch.tensor([0.0, 0.0, 3.0]).expand_as(directions)
    jitter = torch.rand(side * side, generator=generator)
    return tuple(x.contiguous().to(device) for x in (origins, directions, squares < 0.5, jitter))


def hash_case(backend: Backend, points: int, spec: GridSpec, device: torch.device) -> Case:
    """Encode uniform points; the gradient is the table's."""
    generator = torch.Generator().manual_seed(0)
    place = torch.rand(points, 3, generator=generator).to(device)
    table = torch.randn(spec.entries, spec.features, generator=generator).to(device).requires_grad_()
    incoming = torch.randn(points, spec.width, generator=generator).to(device)
    return (
        lambda: backend.hash_encode(place, table, spec),
        lambda out: torch.autograd.grad(out, table, incoming),
    )


def march_case(backend: Backend, points: int, device: torch.device) -> Case:
    """March about as many rays as give that many samples."""
    origins, directions, occupancy, jitter = rays(points // 12, device, torch.Generator().manual_seed(0))
    return lambda: backend.march(origins, directions, occupancy, 0.05, jitter), None


def composite_case(backend: Backend, points: int, device: torch.device) -> Case:
    """Blend colour and distance of marched samples; the gradients are the density's and the values'."""
    generator = torch.Generator().manual_seed(0)
    origins, directions, occupancy, jitter = rays(points // 12, device, generator)
    samples = reference.march(origins, directions, occupancy, 0.05, jitter)
    count = samples.t.shape[0]
    sigma = (torch.rand(count, generator=generator) * 5).to(device).requires_grad_()
    values = torch.rand(count, 4, generator=generator).to(device).requires_grad_()

    def backward(out: reference.Composite) -> None:
        torch.autograd.grad(out.accumulated.sum() + out.opacity.sum(), (sigma, values))

    return lambda: backend.composite(sigma, samples.dt, values, samples.offsets), backward


def measure(cases: dict[str, Case], rounds: int, clock: Callable[[], float], device: torch.device) -> dict[str, list]:
    """Seconds (forward, backward) of each round, by backend; the first turn compiles and is dropped."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, (forward, backward) in cases.items():
            wait()
            start = clock()
            state = forward()
            wait()
            middle = clock()
            if backward is not None:
                backward(state)
                wait()
            if turn:
                seconds[name].append((middle - start, clock() - middle if backward else None))
    return seconds


def rows_of(op: str, points: int, seconds: dict[str, list]) -> list[dict]:
    """One row a backend."""
    rows = []
    for name, turns in seconds.items():
        forward = statistics.median(a for a, _ in turns)
        backward = statistics.median(b for _, b in turns) if turns[0][1] is not None else None
        both = statistics.median(a + (b or 0) for a, b in turns)
        times = zip(("forward_ms", "backward_ms", "forward_backward_ms"), (forward, backward, both))
        row = {"op": op, "backend": name, "points": points}
        rows.append(row | {key: None if value is None else round(value * 1e3, 3) for key, value in times})
    plain = next((r["forward_backward_ms"] for r in rows if r["backend"] == "torch"), None)
    for row in rows:
        row["speedup"] = round(plain / row["forward_backward_ms"], 2) if plain else None
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=OPS, help="one kernel instead of all")
    parser.add_argument("--points", type=int, default=65536, help="points to encode; about as many samples to march")
    parser.add_argument("--backends", default="", help="comma-separated; all that run here unless given")
    parser.add_argument("--levels", type=int, default=16)
    parser.add_argument("--features", type=int, default=2)
    parser.add_argument("--log2-table", type=int, default=17)
    parser.add_argument("--finest", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    names = args.backends.split(",") if args.backends else ["torch", "numba"] if device.type == "cpu" else ["torch"]
    backends = [choose(device, name) for name in names]
    spec = GridSpec(args.levels, args.features, args.log2_table, 16, args.finest)
    build = {
        "hash_encode": lambda backend: hash_case(backend, args.points, spec, device),
        "march": lambda backend: march_case(backend, args.points, device),
        "composite": lambda backend: composite_case(backend, args.points, device),
    }
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    rows = []
    for op in [args.only] if args.only else OPS:
        cases = {backend.name: build[op](backend) for backend in backends}
        rows += rows_of(op, args.points, measure(cases, args.rounds, clock, device))
    if args.json:
        print(json.dumps({"machine": machine(device), "grid": asdict(spec), "clock": args.clock, "rows": rows}))
        return
    print(*(f"{key}: {value}" for key, value in machine(device).items()), f"clock: {args.clock}", sep="\n")
    for row in rows:
        print("  ".join(f"{key} {'-' if value is None else value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
