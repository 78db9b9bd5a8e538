"""Check the kernels on this machine's GPU, and measure them and the main jobs.

    python scripts/gpu_report.py                    on a GPU: under 8 minutes, no network
    python scripts/gpu_report.py --quick            small sizes; always used on a CPU, with Triton interpreted

The script writes benchmarks/gpu_report.json and .md with device, versions, commit and command. It compares every kernel
with the reference in float64, on random and edge inputs. The exit code is 1 if a kernel is wrong or a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from scaling import cost, encoding, scene_step  # noqa: E402

from sds3d import api  # noqa: E402
from sds3d.config import load as config  # noqa: E402
from sds3d.evaluate import generator as evaluation  # noqa: E402
from sds3d.ops import GridSpec, choose, reference  # noqa: E402
from sds3d.runs import launch  # noqa: E402
from sds3d.runs.generator import load_generator  # noqa: E402
from sds3d.runtime.machine import machine  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest
GRIDS = [GridSpec(16, features, 19, 16, 2048) for features in (1, 2, 4, 8)]
SMALL_GRIDS = [GridSpec(3, features, 8, 4, 16) for features in (1, 2, 3, 8)]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, normal: bool = False) -> torch.Tensor:
    """Return reproducible random numbers on the device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn if normal else torch.rand)(shape, generator=generator).to(DEVICE, dtype)


def edge_points(count: int, spec: GridSpec, dtype: torch.dtype) -> torch.Tensor:
    """Return points (count, 3): a quarter on the finest level's cell borders, the rest random, some of them outside the
    box; and the box's corners, NaN and infinite ones."""
    points = draw(count, 3, dtype=dtype) * 1.1 - 0.05
    fine = spec.scales[-1]
    points[: count // 4] = ((points[: count // 4] * fine).floor() + 0.5) / fine
    points[-4:] = torch.tensor([[0.0, 0, 0], [1, 1, 1], [float("nan"), 0.5, 0.5], [float("inf"), -float("inf"), 0.3]])
    return points


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference divided by the largest value."""
    if not got.numel():
        return 0.0
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-12))


def encoding_errors(quick: bool) -> Iterator[tuple[str, torch.dtype, float]]:
    """Yield name, dtype and error of every encoding kernel: features, their gradients, and second derivatives.

    The gradient in the points jumps at a cell's border, and rounding decides on which side of it a point lies. So this
    gradient and its derivatives are compared in float64 only, and not on borders.
    """
    kernels, count = choose(DEVICE, "triton"), 200 if quick else 100_003
    names = (
        "features",
        "table gradient",
        "point gradient",
        "point, then table gradient",
        "point, then weight gradient",
    )
    for spec in SMALL_GRIDS if quick else GRIDS:
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            points = edge_points(count, spec, torch.float64 if dtype == torch.float64 else torch.float32)
            table = draw(spec.entries, spec.features, seed=1, dtype=dtype, normal=True)
            weights = draw(count, spec.width, seed=2, dtype=dtype, normal=True)
            along = draw(count, 3, seed=3, dtype=torch.float64, normal=True)
            along[: count // 4] = 0
            results = []
            for encode, wide in ((kernels.hash_encode, None), (reference.hash_encode, torch.float64)):
                p, t, w = (x.clone().to(wide or x.dtype).requires_grad_() for x in (points, table, weights))
                out = encode(p, t, spec)
                in_table, in_points = torch.autograd.grad(out, (t, p), w, create_graph=True)
                pull = (in_points[count // 4 :] * along[count // 4 :]).sum()
                twice = torch.autograd.grad(pull, (t, w)) if dtype == torch.float64 else ()
                results.append([x.detach() for x in (out, in_table, in_points[count // 4 :], *twice)])
            for name, got, expected in list(zip(names, *results))[: 5 if dtype == torch.float64 else 2]:
                yield f"hash_encode {name}, F = {spec.features}", dtype, error(got, expected)


def ray_errors(quick: bool) -> Iterator[tuple[str, torch.dtype, float]]:
    """Yield name, dtype and error of marching, sample for sample, and of compositing with its gradients."""
    kernels, count = choose(DEVICE, "triton"), 100 if quick else 20_000
    origins = torch.nn.functional.normalize(draw(count, 3, seed=1, normal=True), dim=-1) * 3
    directions = torch.nn.functional.normalize(draw(count, 3, seed=2) * 2 - 1 - origins, dim=-1)
    origins[0], directions[1] = float("nan"), 0
    occupancy = draw(32, 32, 32, seed=3) < 0.4
    for rays in (count, 1, 0):
        inputs = (origins[:rays], directions[:rays], occupancy, 0.02 if not quick else 0.1, draw(rays, seed=4))
        got, expected = kernels.march(*inputs), reference.march(*inputs)
        same = got.offsets.equal(expected.offsets) and got.ray_index.equal(expected.ray_index)
        yield f"march, {rays} rays", torch.float32, error(got.points, expected.points) if same else float("inf")
        total = len(expected.t)
        sigma, values = draw(total, seed=5) * 20, draw(total, 4, seed=6)
        results = []
        for composite, wide in ((kernels.composite, torch.float32), (reference.composite, torch.float64)):
            s, v = sigma.to(wide).requires_grad_(), values.to(wide).requires_grad_()
            out = composite(s, expected.dt.to(wide), v, expected.offsets)
            pull = sum((x * draw(*x.shape, seed=7 + i, dtype=wide)).sum() for i, x in enumerate(out))
            results.append((*(x.detach() for x in out), *torch.autograd.grad(pull, (s, v))))
        names = ("weights", "opacity", "accumulated", "density gradient", "value gradient")
        for name, got, expected in zip(names, *results, strict=True):
            yield f"composite {name}, {rays} rays", torch.float32, error(got, expected)


def benchmarks(quick: bool) -> list[dict]:
    """Return the rows of scripts/bench.py."""
    runs = [["--only", "hash_encode", "--points", "256", "--levels", "2", "--log2-table", "15", "--rounds", "1"]]
    if not quick:
        sizes = ",".join(str(2**k) for k in (14, 16, 18, 20, 21, 22))
        runs = [["--only", "hash_encode", "--points", sizes, "--log2-table", "15,19", "--dtype", d] for d in DTYPES]
        runs += [["--only", op, "--points", sizes] for op in ("march", "composite")]
    rows = []
    for arguments in runs:
        backends = ["--backends", "torch,triton"] if DEVICE.type == "cpu" else []
        command = [sys.executable, "scripts/bench.py", "--json", "--device", DEVICE.type, *arguments, *backends]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
        dtype = arguments[arguments.index("--dtype") + 1] if "--dtype" in arguments else "float32"
        rows += [row | {"dtype": dtype} for row in json.loads(done.stdout)]
    return rows


DTYPES = ("float32", "float16")


def main_job(quick: bool) -> dict:
    """Return time, memory and quality of 300 steps of a scene with the packaged teacher."""
    with tempfile.TemporaryDirectory() as folder:
        layer = {"out": folder, "steps": 4 if quick else 300, "device": DEVICE.type}
        asset, steps = launch.start(config.load("a red house", layer))
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        for _ in steps:
            pass
        seconds = time.perf_counter() - begun
        scores = asset.evaluate()
        peak = torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else None
        times = {"steps": layer["steps"], "seconds": seconds, "ms a step": 1e3 * seconds / layer["steps"]}
        return times | {"peak MB": peak, "kernels": asset.kernels, "iou": scores.iou, "psnr": scores.psnr}


def deterministic(quick: bool) -> dict:
    """Return the milliseconds of the encoding's forward and backward pass with atomic and with deterministic sums."""
    count, levels = (2**8, 2) if quick else (2**20, 16)
    work, row = encoding(count, DEVICE, "triton", levels), {"points": count, "levels": levels}
    for name, repeatable in (("atomic ms", False), ("fixed point ms", True)):
        torch.use_deterministic_algorithms(repeatable)
        row[name] = cost(work, DEVICE, 1 if quick else 9)["ms"]
    torch.use_deterministic_algorithms(False)
    return row | {"cost": row["fixed point ms"] / row["atomic ms"]}


def student_step(quick: bool) -> dict:
    """Return the cost of render, backward and Adam for one view."""
    side = 32 if quick else 512
    return {"pixels a side": side, **cost(scene_step(side, 15, DEVICE), DEVICE, 2 if quick else 20)}


def one_step_generators(quick: bool) -> list[dict]:
    """Train and measure one-step generators by Diff-Instruct, of digits and of toys at 64 pixels."""
    rows, plans = [], (("digits", 3 if quick else 1000, 8 if quick else 128, 600 if quick else 5000),)
    plans += (("toybox", 1 if quick else 1000, 2 if quick else 64, 8 if quick else 2000),)
    with tempfile.TemporaryDirectory() as folder:
        for teacher, steps, batch, images in plans:
            begun = time.perf_counter()
            layer = {"teacher.name": teacher, "steps": steps, "generator.batch": batch, "log.picture_every": 0}
            trained = api.train_generator(**layer, out=folder, device=DEVICE.type)
            row = {"teacher": teacher, "steps": steps, "batch": batch, "seconds": time.perf_counter() - begun}
            row["seconds a step"] = trained.run.rows()[-1]["seconds"] / steps
            painter = load_generator(trained.path, DEVICE.type)
            real = evaluation.real_for(painter.prompts, images)
            rows.append(row | next(evaluation.measure(evaluation.by_generator(painter), images, 1, real)))
    return rows


def latent_step(quick: bool) -> dict:
    """Run scripts/latent_step.py, which measures a step at Stable Diffusion 2.1's size, and return its row."""
    command = [sys.executable, "scripts/latent_step.py", "--device", DEVICE.type, *(["--tiny"] if quick else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def gpu_tests() -> str:
    """Run the tests marked gpu (a step that never waits, the optional backends) and return pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]


def table(rows: list[dict]) -> str:
    """Return rows as a Markdown table."""
    if not rows:
        return ""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    shown = [
        ["" if row.get(k) is None else f"{row[k]:.4g}" if isinstance(row[k], float) else str(row[k]) for k in keys]
        for row in rows
    ]
    lines = [keys, ["---"] * len(keys), *shown]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def commit() -> str:
    """Return the commit of this working tree, "" if git does not know it."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def write(report: dict, out: Path) -> None:
    """Write both files with the parts measured so far."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_report.json").write_text(json.dumps(report, indent=1) + "\n")
    parts = [f"# GPU report\n\n{table([report['about']])}"]
    if DEVICE.type == "cpu":
        parts.append("No GPU: the kernels were interpreted. The checks are valid; the times mean nothing.")
    parts.append(f"Tests that need a GPU: {report['gpu tests']}")
    for name in (
        "main job",
        "one-step generators",
        "student",
        "step at SD 2.1's size",
        "deterministic mode",
        "benchmarks",
        "checks",
    ):
        part = report.get(name, {"failed": "not run"})
        parts.append(f"## {name[0].upper()}{name[1:]}\n\n{table(part if isinstance(part, list) else [part])}")
    (out / "gpu_report.md").write_text("\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, a minute")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of both files")
    options = parser.parse_args()
    quick, begun = options.quick or DEVICE.type == "cpu", time.perf_counter()

    try:
        import triton
    except ImportError:
        sys.exit("the report checks Triton's kernels, on a CPU in its interpreter: pip install triton")

    about = machine(DEVICE) | {
        "triton": triton.__version__,
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
    }
    checks = [
        {"kernel": name, "dtype": str(dtype).removeprefix("torch."), "error": size, "right": size <= TOLERANCE[dtype]}
        for name, dtype, size in [*encoding_errors(quick), *ray_errors(quick)]
    ]
    wrong = [check for check in checks if not check["right"]]
    print(f"{len(checks) - len(wrong)} of {len(checks)} kernel checks right", *wrong, sep="\n", flush=True)
    report = {"about": about, "checks": checks, "gpu tests": gpu_tests() if DEVICE.type == "cuda" else "no GPU"}
    for name, part in (
        ("deterministic mode", deterministic),
        ("student", student_step),
        ("step at SD 2.1's size", latent_step),
        ("main job", main_job),
        ("one-step generators", one_step_generators),
        ("benchmarks", benchmarks),
    ):
        try:
            report[name] = part(quick)
        except (RuntimeError, ValueError, ImportError) as problem:  # go on with the other parts
            report[name] = {"failed": f"{type(problem).__name__}: {problem}"}
        report["seconds"] = time.perf_counter() - begun
        print(f"{name}: done after {report['seconds']:.0f} s", flush=True)
        write(report, options.out)
    failed = [name for name, part in report.items() if isinstance(part, dict) and "failed" in part]
    print(f"{options.out}/gpu_report.md, {report['seconds']:.0f} s")
    print(*(f"{name}: {report[name]['failed']}" for name in failed), sep="\n")
    sys.exit(1 if wrong or failed else 0)


if __name__ == "__main__":
    main()
