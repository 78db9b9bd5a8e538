"""How OpenMP's threads wait, and that torch and numba share them: each case in a process of its own."""

import ctypes
import os
import subprocess
import sys

import pytest

from sds3d.runtime import threads

KERNEL = """
from sds3d.ops import GridSpec, numba_cpu
spec = GridSpec(levels=3, features=2, log2_table=8, base=4, finest=16)
numba_cpu.hash_encode(torch.rand(5000, 3), torch.rand(spec.entries, 2), spec)
"""


def run(code: str, **environment: str) -> str:
    """What a new process prints that has no OpenMP settings but these."""
    clean = {name: value for name, value in os.environ.items() if name not in threads.SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def system_has_openmp() -> bool:
    try:
        ctypes.CDLL(threads.SYSTEM)
    except OSError:
        return False
    return True


def test_a_users_settings_stay():
    code = "import sds3d, os; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"
    assert run(code) == f"None {threads.SPINS}"
    assert run(code, OMP_WAIT_POLICY="active") == "active None"
    assert run(code, GOMP_SPINCOUNT="7") == "None 7"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({}, f"spin {threads.SPINS} times, then sleep (sds3d's default"),
        ({"GOMP_SPINCOUNT": "7"}, "spin 7 times, then sleep (by GOMP_SPINCOUNT)"),
        ({"OMP_WAIT_POLICY": "passive"}, "passive, by OMP_WAIT_POLICY"),
    ],
)
def test_doctor_says_how_threads_wait(setting, said):
    assert run("import sds3d; print(sds3d.runtime.threads.describe())", **setting).startswith(said)


@pytest.mark.slow
@pytest.mark.skipif(not system_has_openmp(), reason="the system has no OpenMP library of its own")
@pytest.mark.parametrize(
    ("first", "pools"),
    [("import sds3d, torch", "one pool for torch and numba"), ("import torch, sds3d", "torch's and numba's own pools")],
)
def test_torch_and_numba_share_one_pool(first, pools):
    assert run(f"{first}\n{KERNEL}\nprint(sds3d.runtime.threads.pool())").startswith(pools)
