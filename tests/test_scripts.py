"""The scripts that others run to measure: what they print can be read by a program, and is right."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("op", ["hash_encode", "march", "composite"])
def test_bench_prints_a_list_of_rows(op: str):
    done = run("scripts/bench.py", "--only", op, "--points", "512,1024", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["op"], row["backend"], row["points"]) for row in rows] == [
        (op, backend, points) for points in (512, 1024) for backend in ("torch", "numba")
    ]
    for row in rows:
        assert row["forward_ms"] > 0 and row["forward_backward_ms"] >= row["forward_ms"] and row["bytes"] > 0
        assert (row["backward_ms"] is None) == (op == "march")  # samples have no gradient
    assert "cpu" in done.stderr  # the machine


def test_gpu_report_is_right_on_a_cpu(tmp_path):
    """Small sizes, Triton interpreted: every kernel against the reference in float64, and every part of the report."""
    done = run("scripts/gpu_report.py", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    assert len(report["checks"]) > 50 and all(check["right"] for check in report["checks"])
    assert {check["dtype"] for check in report["checks"]} == {"float64", "float32", "float16", "bfloat16"}
    assert report["main job"]["iou"] > 0 and 0 < report["step at SD 2.1's size"]["rest_share"] < 1
    assert [row["teacher"] for row in report["one-step generators"]] == ["digits", "toybox"]
    digits, toys = report["one-step generators"]
    assert digits["fd_feat"] > 0 and math.isfinite(toys["kid_feat"]) and "fd_feat" not in toys  # of 8 images only
    assert {row["backend"] for row in report["benchmarks"]} == {"torch", "triton"}
    text = (tmp_path / "gpu_report.md").read_text()
    assert "the times mean nothing" in text and "hash_encode table gradient" in text


def test_every_mutant_changes_something_that_stands_there():
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "scripts" / "mutants.py")
    mutants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutants)
    for file, old, new in mutants.MUTANTS:
        assert old in (ROOT / "sds3d" / file).read_text() and new != old, (file, old)
    assert len(set(mutants.MUTANTS)) == len(mutants.MUTANTS)
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for name in mutants.TESTS)
