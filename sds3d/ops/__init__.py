"""The hot kernels: hash encoding, ray marching and compositing, and the choice of who computes them.

`reference` is the definition, in plain torch. A `Backend` holds three functions with its signatures.
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

LINK = (
    "backend triton wants a C compiler and Python's headers, with which Triton builds its link to the driver once: "
    "install gcc and python3-dev"
)


@dataclass(frozen=True)
class Backend:
    """Three kernels with the signatures of `sds3d.ops.reference`, and why they were chosen."""

    name: str
    reason: str
    hash_encode: Callable
    march: Callable
    composite: Callable

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose(device: torch.device | str = "cpu", wanted: str = "auto") -> Backend:
    """The kernels for a device.

    Args:
        device: where the tensors live.
        wanted: one of BACKENDS. "auto" is triton on CUDA and numba on a CPU, where they are installed, else torch; it
            never picks one that compiles CUDA on first use or that needs a hand-built package (nerfacc, tinycudann).

    Raises:
        ValueError: the name is unknown, or that backend cannot run here: how to get it, and what auto would take.
    """
    device = torch.device(device)
    if wanted not in BACKENDS:
        raise ValueError(f"backend is {wanted!r}; give one of {', '.join(BACKENDS)}")
    if wanted == "auto":
        return _automatic(device)
    if wanted == "torch":
        return _torch("asked for")
    try:
        if wanted == "numba":
            return _numba(device, "asked for")
        return _triton(device, "asked for") if wanted == "triton" else _cuda(device, wanted)
    except ValueError as error:
        raise ValueError(f"{error}, which takes {_automatic(device).name} here") from error


def _automatic(device: torch.device) -> Backend:
    """The fastest that runs here without building or compiling anything."""
    if device.type == "cuda":
        missing = _missing_for_triton(device)
        return _torch(f"{missing}; many times faster on a GPU") if missing else _triton(device, "made for GPUs")
    if device.type != "cpu":
        return _torch(f"plain torch is what runs on {device.type} without building anything")
    if importlib.util.find_spec("numba") is None:
        return _torch("numba is not installed; pip install numba is many times faster on a CPU")
    return _numba(device, "the fastest on a CPU")


def _torch(reason: str) -> Backend:
    """Plain torch, anywhere."""
    return Backend("torch", reason, reference.hash_encode, reference.march, reference.composite)


def _numba(device: torch.device, reason: str) -> Backend:
    """numba's kernels, CPU only."""
    if device.type != "cpu":
        raise ValueError(f"backend numba runs on a CPU, not on {device.type}; give --device cpu or --backend auto")
    if importlib.util.find_spec("numba") is None:
        raise ValueError("backend numba is not installed; pip install numba, or give --backend auto")
    from sds3d.ops import numba_cpu

    return Backend("numba", reason, numba_cpu.hash_encode, numba_cpu.march, numba_cpu.composite)


def _triton(device: torch.device, reason: str) -> Backend:
    """Triton's kernels: CUDA, or a CPU under Triton's interpreter."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend triton runs on CUDA, not on {device.type} (TRITON_INTERPRET=1 interprets it there, for tests); "
            "give --device cuda or --backend auto"
        )
    if missing := _missing_for_triton(device):
        raise ValueError(f"{missing}; or give --backend auto")
    from sds3d.ops import triton_gpu

    return Backend("triton", reason, triton_gpu.hash_encode, triton_gpu.march, triton_gpu.composite)


def _missing_for_triton(device: torch.device) -> str:
    """What Triton would need on a device, "" where nothing is missing; a GPU is tried, once."""
    if importlib.util.find_spec("triton") is None:
        return "backend triton wants triton: pip install triton"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (interpreted or os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return LINK
    if interpreted or device.type != "cuda":
        return ""
    from sds3d.ops import triton_gpu

    refused = triton_gpu.refusal(device)
    return refused and f"{LINK} (a first launch failed: {refused})"


def _cuda(device: torch.device, wanted: str) -> Backend:
    """The opt-in CUDA adapters, each for the kernels it has; what "auto" takes for the others."""
    if device.type != "cuda":
        raise ValueError(f"backend {wanted} runs on CUDA, not on {device.type}; give --device cuda or --backend auto")
    others = choose(device)
    hash_encode, march, composite = others.hash_encode, others.march, others.composite
    if "tinycudann" in wanted:
        from sds3d.ops import tcnn_cuda

        tcnn_cuda.check()
        hash_encode = tcnn_cuda.hash_encode
    if "nerfacc" in wanted:
        from sds3d.ops import nerfacc_cuda

        nerfacc_cuda.check()
        march, composite = nerfacc_cuda.march, nerfacc_cuda.composite
    return Backend(wanted, f"asked for; the rest is {others.name}", hash_encode, march, composite)
