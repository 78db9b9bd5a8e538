"""Copies between host and GPU without synchronisation.

The host waits for all queued GPU work when it copies from unpinned memory and when it reads a value from the GPU. So
tensors are pinned before they are copied to the GPU, and a step's numbers are collected and copied back once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def onto(x: Tensor, device: torch.device | str) -> Tensor:
    """Return ``x`` on the device. A copy from the host to a GPU uses pinned memory, so that the host does not wait."""
    device = torch.device(device)
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class StepMetrics:
    """The named numbers of one step, and the checks that it must pass.

    Values on a CPU are read and checked at once, and values on a GPU by ``read``.
    """

    def __init__(self):
        self._numbers: dict[str, float | Tensor] = {}
        self._checks: list[tuple[Tensor, Exception]] = []

    def add(self, name: str, value: float | Tensor) -> None:
        """Add a number, or a tensor of one number."""
        value = value.detach() if isinstance(value, Tensor) else value
        self._numbers[name] = value if isinstance(value, Tensor) and value.is_cuda else float(value)

    def require(self, good: Tensor, error: Exception) -> None:
        """Raise the error unless ``good``, a bool () tensor, is true: at once on a CPU, in ``read`` on a GPU."""
        if good.is_cuda:
            self._checks.append((good, error))
        elif not bool(good):
            raise error

    def read(self) -> dict[str, float]:
        """Return the numbers by name, after one copy from the GPU.

        Raises:
            Exception: the error of the first failed check.
        """
        on_gpu = {name: value for name, value in self._numbers.items() if isinstance(value, Tensor)}
        numbers = [*on_gpu.values(), *(good for good, _ in self._checks)]
        host = torch.stack([x.double().reshape(()) for x in numbers]).tolist() if numbers else []
        for good, (_, error) in zip(host[len(on_gpu) :], self._checks, strict=True):
            if not good:
                raise error
        read = dict(zip(on_gpu, host))
        return {name: read[name] if isinstance(x, Tensor) else x for name, x in self._numbers.items()}
