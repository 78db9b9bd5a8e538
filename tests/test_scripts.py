"""The scripts that others run to measure: what they print can be read by a program, and is right."""

import ast
import importlib.util
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sds3d.evaluate.true_teacher import TrueTeacher

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["hash_encode", "hash_slope", "march", "composite"])
def test_bench_prints_a_list_of_rows(op: str):
    done = run("scripts/bench.py", "--only", op, "--points", "512,1024", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["op"], row["backend"], row["points"]) for row in rows] == [
        (op, backend, points) for points in (512, 1024) for backend in ("torch", "numba")
    ]
    for row in rows:
        assert row["forward_ms"] > 0 and row["forward_backward_ms"] > 0 and row["bytes"] > 0
        assert (row["backward_ms"] is None) == (op == "march")  # samples have no gradient
    assert "cpu" in done.stderr  # the machine


@pytest.mark.slow
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


def as_module(name: str):
    """A script, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def mutants():
    return as_module("mutants")


def test_every_mutant_changes_something_that_stands_there(mutants):
    for mutant in mutants.MUTANTS:
        source = (ROOT / "sds3d" / mutant[0]).read_text()
        changed = mutants.planted(source, *mutant)  # which says the mutant and its function, where it is lost
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), mutant
    assert len(set(mutants.MUTANTS)) == len(mutants.MUTANTS) >= 106
    assert all((ROOT / "tests" / f"test_{name}.py").is_file() for name in mutants.TESTS)


LAID_OUT = """
class Loss:
    kind = "a"

    def __call__(self, x):
        first = x.sum(  # why
            dim=1, keepdim = True)
        return (first
                - x * 2)

    def other(self, x):
        return x - x - x
"""


def test_a_mutant_is_found_however_the_source_is_laid_out_and_missed_by_name(mutants):
    def changed(function, old, new):
        return mutants.planted(LAID_OUT, "a/loss.py", function, old, new)

    assert "first + x * 2" in changed("Loss.__call__", "first - x * 2", "first + x * 2")
    assert "(first - x) * 2" in changed("Loss.__call__", "first - x * 2", "(first - x) * 2")
    assert "x.sum(dim=0, keepdim=True)" in changed(
        "Loss.__call__", "x.sum(dim=1, keepdim=True)", "x.sum(dim=0, keepdim=True)"
    )
    assert "kind = 'b'" in changed("Loss", "kind = 'a'", "kind = 'b'")
    assert "first" not in changed("Loss.__call__", "first = x.sum(dim=1, keepdim=True)", "pass").partition("return")[0]
    for function, old, said in (
        ("Loss.__call__", "x - x", "'x - x' -> '0' in Loss.__call__ of sds3d/a/loss.py: it stands there 0 times"),
        ("Loss.__call__", "x", "in Loss.__call__ of sds3d/a/loss.py: it stands there 2 times"),
        ("Loss.gone", "x", "in Loss.gone of sds3d/a/loss.py: there are 0 of that name"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            changed(function, old, "0")


def test_held_out_goes_on_where_it_was_stopped(tmp_path):
    """Assets that a folder holds are read, not made again; those of other settings are refused."""
    figures = {"iou": 0.9, "psnr": 20.0, "psnr_albedo": None, "chamfer": 0.1, "fscore": 0.8}
    figures |= {"fscore_fine": 0.5, "normals": 0.7}
    figures |= {"depth_error": 0.1, "missed": 0.0, "components": 1, "genus": None, "true_components": 1}
    figures |= {"true_genus": 1, "topology": False, "seconds": 3.0}
    for seed, better in ((0, {}), (1, {"iou": 0.7, "chamfer": None, "genus": 1, "topology": True})):
        row = {"overrides": ["steps=9"], **figures, **better}
        (tmp_path / f"a-blue-mug-{seed}.json").write_text(json.dumps(row))
    command = ["scripts/held_out.py", "steps=9", "--prompts", "a blue mug", "--seeds", "0", "1", "--out", str(tmp_path)]
    done = run(*command, "--json", str(tmp_path / "all.json"))
    assert done.returncode == 0, done.stderr
    assert "a blue mug, seed 1" in done.stdout and "genus 1 (1)" in done.stdout and "chamfer -" in done.stdout
    report = json.loads((tmp_path / "all.json").read_text())
    assert report["assets"] == 2 and set(report["prompts"]["a blue mug"]["seeds"]) == {"0", "1"}
    assert report["mean"]["iou"] == 0.8 and report["mean"]["chamfer"] == 0.1 and report["mean"]["topology"] == 0.5
    other = run(*["steps=8" if part == "steps=9" else part for part in command])
    assert other.returncode != 0 and "give another --out" in other.stderr
    seed = run("scripts/held_out.py", "seed=3")
    assert seed.returncode == 2 and "--seeds" in seed.stderr


def test_the_accuracy_on_the_surface_is_that_of_a_known_teacher():
    """The true images in the teacher's place are exact; a teacher whose depths are 0.1 too near is 0.1 off."""
    module = as_module("surface_accuracy")

    class Near(TrueTeacher):
        def predict(self, x_t, t, prompts, cameras=None, camera_mask=None):
            found = super().predict(x_t, t, prompts, cameras, camera_mask)
            return replace(found, output=found.output + 0.1) if "depths" in prompts[0] else found

    angle, error, mean = module.errors(TrueTeacher(), 0.9, 32, 1)
    assert angle < 0.5 and error < 1e-3 and abs(mean) < 1e-3
    assert module.errors(Near(), 0.9, 32, 1)[1:] == pytest.approx((0.1, 0.1), abs=1e-3)
