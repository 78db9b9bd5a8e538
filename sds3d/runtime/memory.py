"""The most memory that was used at once: of a GPU, of this process, or of what a block of code makes."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def reset_peak() -> None:
    """Start counting anew, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak(device: torch.device) -> float | None:
    """MB since the last reset: what torch held on a GPU, or what the process had of the host's; None if unknown.
    Costs microseconds, and no GPU waits for it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) / 1024


class Meter(TorchDispatchMode):
    """Counts what torch's operations make inside the block: storages, from the first operation that returns one until
    it is freed. Of torch's fake tensors, too, which have a size and no memory.

    Attributes:
        live, peak: bytes that are there now, and that were there at most.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            self._note(tensor, 0)  # what comes from outside, a weight, is not counted; nor is a view of it
        made = func(*args, **kwargs)
        for tensor in tree_leaves(made):
            self._note(tensor, None)
        return made

    def _note(self, tensor: Any, size: int | None) -> None:
        """Count a tensor's storage unless it is known, as of this size or its own."""
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        mark = storage._cdata
        if mark in self._known:
            return
        size = storage.nbytes() if size is None else size

        def freed(_: weakref.ref) -> None:
            self.live -= size
            del self._known[mark]

        self._known[mark] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def held(*modules: nn.Module | None) -> int:
    """Bytes of the modules' parameters and buffers, each once."""
    tensors = {x for module in modules if module is not None for x in (*module.parameters(), *module.buffers())}
    return sum(x.numel() * x.element_size() for x in tensors)


def hollow(module: nn.Module) -> nn.Module:
    """The module itself, with fake tensors in place of its own: to be called inside a FakeTensorMode."""
    twins: dict[Tensor, Tensor] = {}  # weights that two modules share stay one
    for part in module.modules():
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is None:
                continue
            if tensor not in twins:
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                twin = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                twins[tensor] = twin
            setattr(part, name, twins[tensor])  # which keeps a parameter a parameter, and a buffer a buffer
    return module
