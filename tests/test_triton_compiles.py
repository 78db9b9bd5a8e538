"""The interpreter takes what Triton's compiler refuses: so compile every kernel, too, for a GPU that is not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_kernel_compiles_for_an_h100():
    pytest.importorskip("triton", reason="Triton runs on Linux only")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    program = [sys.executable, "tests/compile_kernels.py"]
    done = subprocess.run(program, cwd=ROOT, env={**environment, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 39
