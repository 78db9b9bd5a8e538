"""Peak memory: of a GPU, of this process, or of the tensors that a block of code creates."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def reset_peak() -> None:
    """Reset the peaks, if the system supports it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak(device: torch.device) -> float | None:
    """Return the peak in MiB since the last reset: torch's memory on a GPU, else the process's; None if unknown.

    Takes microseconds and does not wait for the GPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) / 1024


class Meter(TorchDispatchMode):
    """Counts the memory that torch's operations allocate inside the block.

    A storage counts from the first operation that returns it until it is freed. Fake tensors, which have a size but no
    memory, count too.

    Attributes:
        live, peak: bytes allocated now, and their maximum so far.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            self._note(tensor, 0)  # inputs from outside the block, such as weights, and their views count 0
        outputs = func(*args, **kwargs)
        for tensor in tree_leaves(outputs):
            self._note(tensor, None)
        return outputs

    def _note(self, tensor: Any, size: int | None) -> None:
        """Count a tensor's storage unless it is known already; ``size`` None is the storage's own size."""
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return
        size = storage.nbytes() if size is None else size

        def freed(_: weakref.ref) -> None:
            self.live -= size
            del self._known[address]

        self._known[address] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def tensor_bytes(*modules: nn.Module | None) -> int:
    """Return the bytes of the modules' parameters and buffers; shared tensors count once."""
    tensors = {x for module in modules if module is not None for x in (*module.parameters(), *module.buffers())}
    return sum(x.numel() * x.element_size() for x in tensors)


def use_fake_tensors(module: nn.Module) -> nn.Module:
    """Replace the module's parameters and buffers by fake tensors, and return it. Call it inside a FakeTensorMode."""
    twins: dict[Tensor, Tensor] = {}  # keeps weights shared between modules shared
    for part in module.modules():
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is None:
                continue
            if tensor not in twins:
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                twin = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                twins[tensor] = twin
            setattr(part, name, twins[tensor])  # a parameter stays a parameter, a buffer a buffer
    return module
