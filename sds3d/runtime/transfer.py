"""Between host and GPU without waiting.

A copy from ordinary memory, and any number that is asked of a GPU, stop the host until the GPU has done everything it
was told before. So what goes over is pinned first, and what comes back is collected and copied once, at a step's end.
"""

from __future__ import annotations

import torch
from torch import Tensor


def onto(x: Tensor, device: torch.device | str) -> Tensor:
    """``x`` on the device; from the host to a GPU through pinned memory, so that nobody waits."""
    device = torch.device(device)
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class Figures:
    """The named numbers of one step, and what has to be true of it.

    What lies on a CPU is looked at as it comes; what lies on a GPU waits for ``read``.
    """

    def __init__(self):
        self._numbers: dict[str, float | Tensor] = {}
        self._checks: list[tuple[Tensor, Exception]] = []

    def add(self, name: str, value: float | Tensor) -> None:
        """A number, or a tensor of one number."""
        value = value.detach() if isinstance(value, Tensor) else value
        self._numbers[name] = value if isinstance(value, Tensor) and value.is_cuda else float(value)

    def require(self, good: Tensor, error: Exception) -> None:
        """Raise the error unless ``good``, a bool () tensor, is true: at once, or when a GPU's figures are read."""
        if good.is_cuda:
            self._checks.append((good, error))
        elif not bool(good):
            raise error

    def read(self) -> dict[str, float]:
        """The numbers by name, after one copy.

        Raises:
            Exception: the error of the first check that failed.
        """
        waiting = {name: value for name, value in self._numbers.items() if isinstance(value, Tensor)}
        numbers = [*waiting.values(), *(good for good, _ in self._checks)]
        host = torch.stack([x.double().reshape(()) for x in numbers]).tolist() if numbers else []
        for good, (_, error) in zip(host[len(waiting) :], self._checks, strict=True):
            if not good:
                raise error
        came = dict(zip(waiting, host))
        return {name: came[name] if isinstance(x, Tensor) else x for name, x in self._numbers.items()}
