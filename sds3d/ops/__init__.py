"""The hot kernels: hash encoding, its slope, ray marching and compositing, and the choice of a backend for them.

`reference` defines the kernels in plain torch. A `Backend` holds four functions with the same signatures.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sds3d.ops import reference
from sds3d.ops.reference import TERMINATION, Composite, GridSpec, Samples

__all__ = ["BACKENDS", "TERMINATION", "Backend", "Composite", "GridSpec", "Samples", "choose"]

BACKENDS = ("auto", "torch", "numba", "triton", "tinycudann", "nerfacc", "tinycudann+nerfacc")

COMPILER_MISSING = (
    "backend triton needs a C compiler and Python's headers: with them Triton builds its link to the driver once; "
    "install gcc and python3-dev"
)


@dataclass(frozen=True)
class Backend:
    """Four kernels with the signatures of `sds3d.ops.reference`, and the reason for which they were chosen."""

    name: str
    reason: str
    hash_encode: Callable
    hash_slope: Callable
    march: Callable
    composite: Callable

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose(device: torch.device | str = "cpu", name: str = "auto") -> Backend:
    """Return the kernels for a device.

    Args:
        device: where the tensors live.
        name: one of BACKENDS. "auto" is triton on CUDA and numba on a CPU if they are installed, else torch. It
            never picks a backend that compiles CUDA on first use or that needs a hand-built package (nerfacc,
            tinycudann).

    Raises:
        ValueError: the name is unknown, or the backend cannot run here. The message says how to install it and which
            backend "auto" would choose.
    """
    device = torch.device(device)
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; give one of {', '.join(BACKENDS)}")
    if name == "auto":
        return _automatic(device)
    if name == "torch":
        return _torch("requested")
    try:
        if name == "numba":
            return _numba(device, "requested")
        return _triton(device, "requested") if name == "triton" else _cuda(device, name)
    except ValueError as error:
        raise ValueError(f"{error}, which takes {_automatic(device).name} here") from error


def _automatic(device: torch.device) -> Backend:
    """Return the fastest backend that runs here without building or compiling CUDA code."""
    if device.type == "cuda":
        missing = _missing_for_triton(device)
        return _torch(f"{missing}; many times faster on a GPU") if missing else _triton(device, "made for GPUs")
    if device.type != "cpu":
        return _torch(f"only plain torch runs on {device.type}")
    if importlib.util.find_spec("numba") is None:
        return _torch("numba is not installed; pip install numba is many times faster on a CPU")
    return _numba(device, "the fastest on a CPU")


def _torch(reason: str) -> Backend:
    """Return plain torch, which runs on every device."""
    return Backend("torch", reason, reference.hash_encode, reference.hash_slope, reference.march, reference.composite)


def _numba(device: torch.device, reason: str) -> Backend:
    """Return numba's kernels, for a CPU only."""
    if device.type != "cpu":
        raise ValueError(f"backend numba runs on a CPU, not on {device.type}; give --device cpu or --backend auto")
    if importlib.util.find_spec("numba") is None:
        raise ValueError("backend numba is not installed; pip install numba, or give --backend auto")
    from sds3d.ops import numba_cpu

    return Backend("numba", reason, numba_cpu.hash_encode, numba_cpu.hash_slope, numba_cpu.march, numba_cpu.composite)


def _triton(device: torch.device, reason: str) -> Backend:
    """Return Triton's kernels, for CUDA, or for a CPU under Triton's interpreter."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend triton runs on CUDA, not on {device.type} (for tests, TRITON_INTERPRET=1 runs it on a CPU); "
            "give --device cuda or --backend auto"
        )
    if missing := _missing_for_triton(device):
        raise ValueError(f"{missing}; or give --backend auto")
    from sds3d.ops import triton_gpu

    return Backend(
        "triton", reason, triton_gpu.hash_encode, triton_gpu.hash_slope, triton_gpu.march, triton_gpu.composite
    )


def _missing_for_triton(device: torch.device) -> str:
    """Return what Triton still needs on a device, "" if it can run. On a GPU one kernel is launched, once a process."""
    if importlib.util.find_spec("triton") is None:
        return "backend triton is not installed; pip install triton"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (interpreted or os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return COMPILER_MISSING
    if interpreted or device.type != "cuda":
        return ""
    from sds3d.ops import triton_gpu

    error = triton_gpu.launch_error(device)
    return error and f"{COMPILER_MISSING} (the first launch failed: {error})"


def _cuda(device: torch.device, name: str) -> Backend:
    """Return the opt-in CUDA adapters for the kernels they have, and the automatic choice for the others."""
    if device.type != "cuda":
        raise ValueError(f"backend {name} runs on CUDA, not on {device.type}; give --device cuda or --backend auto")
    others = choose(device)
    hash_encode, hash_slope, march, composite = others.hash_encode, others.hash_slope, others.march, others.composite
    if "tinycudann" in name:
        from sds3d.ops import tcnn_cuda

        tcnn_cuda.check()
        hash_encode, hash_slope = tcnn_cuda.hash_encode, tcnn_cuda.hash_slope
    if "nerfacc" in name:
        from sds3d.ops import nerfacc_cuda

        nerfacc_cuda.check()
        march, composite = nerfacc_cuda.march, nerfacc_cuda.composite
    return Backend(name, f"requested; the other kernels are {others.name}", hash_encode, hash_slope, march, composite)
