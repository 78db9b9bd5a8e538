"""One batch over several processes (torchrun): each draws the whole batch's chances and keeps its own rows.

So every process has the same random stream, and the same batch gives the same steps however many share it, but for the
order in which gradients are summed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """A process's part of every batch.

    Args:
        index: of this process, from 0.
        count: of processes.
    """

    index: int = 0
    count: int = 1

    def of(self, whole: int) -> int:
        """Rows of this process in a batch of ``whole``. Raises ValueError where it cannot be shared evenly."""
        if whole % self.count:
            raise ValueError(f"a batch of {whole} cannot be shared by {self.count} processes; give a multiple of that")
        return whole // self.count

    def rows(self, whole: Tensor) -> Tensor:
        """This process's rows of something drawn for the whole batch."""
        return whole.chunk(self.count)[self.index] if self.count > 1 else whole

    def randn(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal noise for this process's rows, ``shape``."""
        return self.rows(torch.randn(self._all(shape), generator=generator, device=generator.device, dtype=dtype))

    def rand(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Numbers in [0, 1) for this process's rows, ``shape``."""
        return self.rows(torch.rand(self._all(shape), generator=generator, device=generator.device))

    def randint(self, high: int, count: int, generator: torch.Generator) -> Tensor:
        """Whole numbers below ``high`` for this process's ``count`` rows."""
        return self.rows(torch.randint(high, (count * self.count,), generator=generator))

    def _all(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] * self.count, *shape[1:])

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            dist.barrier()

    def agree(self, wish: bool) -> bool:
        """Whether any process wishes it; every process gets the same answer."""
        if self.count == 1:
            return wish
        wishes = torch.tensor(float(wish))
        dist.all_reduce(wishes)
        return bool(wishes > 0)

    @torch.no_grad()
    def average(self, parameters: Iterable[Tensor]) -> None:
        """Give every process the mean of all processes' gradients."""
        if self.count == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        flat /= self.count
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(mean.view_as(grad))


def join() -> Share:
    """This process's share: all of it, or what torchrun's environment says; joins the others where it has not yet."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Share()
    if not dist.is_initialized():
        both = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(both, timeout=timedelta(hours=6))
    if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return Share(dist.get_rank(), count)
