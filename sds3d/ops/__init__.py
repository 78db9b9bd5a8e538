"""The hot kernels: hash encoding, ray marching and compositing, and the choice of who computes them.

`reference` is the definition, in plain torch. A `Backend` holds three functions with its signatures.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sds3d.ops import reference
from sds3d.ops.reference import TERMINATION, Composite, GridSpec, Samples

__all__ = ["BACKENDS", "TERMINATION", "Backend", "Composite", "GridSpec", "Samples", "choose"]

BACKENDS = ("auto", "torch", "numba", "tcnn", "nerfacc", "tcnn+nerfacc")


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
        wanted: one of BACKENDS. "auto" is numba on a CPU that has it, else torch; it never picks one
            that compiles CUDA on first use or that needs a hand-built package (nerfacc, tcnn).

    Raises:
        ValueError: the name is unknown, or that backend cannot run here.
    """
    device = torch.device(device)
    if wanted not in BACKENDS:
        raise ValueError(f"backend is {wanted!r}; give one of {', '.join(BACKENDS)}")
    if wanted == "torch":
        return _torch("asked for")
    if wanted == "numba":
        return _numba(device, "asked for")
    if wanted != "auto":
        return _cuda(device, wanted)
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
        raise ValueError(f"backend numba runs on a CPU, not on {device.type}; give --backend auto or --device cpu")
    from sds3d.ops import numba_cpu

    return Backend("numba", reason, numba_cpu.hash_encode, numba_cpu.march, numba_cpu.composite)


def _cuda(device: torch.device, wanted: str) -> Backend:
    """The opt-in CUDA adapters, each for the kernels it has; torch for the others."""
    if device.type != "cuda":
        raise ValueError(f"backend {wanted} runs on CUDA, not on {device.type}; give --backend auto or --device cuda")
    hash_encode, composite = reference.hash_encode, reference.composite
    if "tcnn" in wanted:
        from sds3d.ops import tcnn_cuda

        tcnn_cuda.check()
        hash_encode = tcnn_cuda.hash_encode
    if "nerfacc" in wanted:
        from sds3d.ops import nerfacc_cuda

        nerfacc_cuda.check()
        composite = nerfacc_cuda.composite
    return Backend(wanted, "asked for", hash_encode, reference.march, composite)
