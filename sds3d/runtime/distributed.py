"""One batch over several processes (torchrun).

Every process draws the random numbers of the whole batch and keeps its own rows. So all processes have the same random
stream, and the steps do not depend on the number of processes, except for the order in which gradients are summed.

There are two ways to hold the weights. Without sharding each process keeps all weights, and
`Processes.average_gradients` averages their gradients, as DDP does. With sharding (FSDP2, torch's fully_shard) each
process keeps a part of every weight, of its gradient and of its optimiser state; FSDP gathers a block's weights when
the block runs, and averages the gradients itself.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """The process group of a run, and this process's part of every batch.

    Args:
        rank: index of this process, from 0.
        world_size: number of processes.
        sharded: whether each process keeps only a part of the trained weights (FSDP).
    """

    rank: int = 0
    world_size: int = 1
    sharded: bool = False

    def local_batch(self, batch: int) -> int:
        """Return how many rows of a batch this process has.

        Raises:
            ValueError: the batch is not a multiple of the number of processes.
        """
        if batch % self.world_size:
            raise ValueError(
                f"a batch of {batch} cannot be shared by {self.world_size} processes; give a multiple of that"
            )
        return batch // self.world_size

    def rows(self, batch: Tensor) -> Tensor:
        """Return this process's rows of a tensor drawn for the whole batch."""
        return batch.chunk(self.world_size)[self.rank] if self.world_size > 1 else batch

    def randn(self, shape: tuple[int, ...], rng: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Draw normal noise of ``shape`` for this process's rows."""
        return self.rows(torch.randn(self._whole(shape), generator=rng, device=rng.device, dtype=dtype))

    def rand(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Draw numbers in [0, 1) of ``shape`` for this process's rows."""
        return self.rows(torch.rand(self._whole(shape), generator=rng, device=rng.device))

    def randint(self, high: int, count: int, rng: torch.Generator) -> Tensor:
        """Draw integers in [0, high) for this process's ``count`` rows."""
        return self.rows(torch.randint(high, (count * self.world_size,), generator=rng))

    def _whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape for the whole batch."""
        return (shape[0] * self.world_size, *shape[1:])

    def barrier(self) -> None:
        """Wait until every process has called this."""
        if self.world_size > 1:
            dist.barrier()

    def any_process(self, flag: bool) -> bool:
        """Return, in every process, whether the flag of any process is true."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor(float(flag))
        dist.all_reduce(flags)
        return bool(flags > 0)

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Set the gradients to their mean over all processes. Does nothing if sharded, as FSDP has done it."""
        if self.world_size == 1 or self.sharded:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        flat /= self.world_size
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(mean.view_as(grad))

    def shard(self, module: nn.Module) -> None:
        """Shard a module's weights over the processes if ``sharded``. Call it before building the optimiser.

        Afterwards the module cannot be copied. All processes must run it together, and must call state_dict() together.
        In rank 0 state_dict() returns the whole weights, as without sharding; in the others it holds None.
        load_state_dict() takes the whole weights.
        """
        if not self.sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        device = next(module.parameters()).device.type
        mesh = init_device_mesh(device, (self.world_size,))
        # FSDP requires this memory format; the type hints of Module.to do not know the argument
        module.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
        blocks = [part for parts in reversed(lists) for part in parts if not isinstance(part, nn.ModuleList)]
        for part in (*(block for block in blocks if any(block.children())), module):
            # free the gathered weights after every pass: else a pass after the next optimiser step would use old ones
            sharded = fully_shard(part, mesh=mesh, reshard_after_forward=True)
            sharded.set_force_sum_reduction_for_comms(device == "cpu")  # gloo has no mean reduction
        if hasattr(module, "features"):
            register_fsdp_forward_method(module, "features")
        module.register_state_dict_post_hook(lambda _, state, *rest: state.update(self._gathered(state)))
        own = dict(module.named_parameters())
        module.register_load_state_dict_pre_hook(
            lambda _, state, *rest: state.update({k: _part(v, own[k]) for k, v in state.items() if k in own})
        )

    def shard_states(self, optimiser: torch.optim.Optimizer) -> None:
        """Make an optimiser's state_dict() and load_state_dict() hold whole tensors, as `shard` does for a module."""
        if not self.sharded:
            return
        own = [p for group in optimiser.param_groups for p in group["params"]]

        def cut(_: Any, state: dict[str, Any]) -> dict[str, Any]:
            parts = {i: {k: _part(v, own[i]) for k, v in moments.items()} for i, moments in state["state"].items()}
            return {"state": parts, "param_groups": [{**group, **many} for group in state["param_groups"]]}

        def whole(_: Any, state: dict[str, Any]) -> dict[str, Any]:
            groups = [{**group, "foreach": None} for group in state["param_groups"]]
            return {"state": self._gathered(state["state"]), "param_groups": groups}

        # By default torch updates plain weights of a GPU all at once, but sharded ones one by one
        many = {"foreach": not optimiser.defaults["fused"]}
        for group in optimiser.param_groups:
            group |= many
        optimiser.register_state_dict_post_hook(whole)
        optimiser.register_load_state_dict_pre_hook(cut)

    def _gathered(self, state: Any) -> Any:
        """Return a state with sharded tensors replaced by whole ones on the CPU; by None in all ranks but 0."""
        if isinstance(state, dict):
            return {key: self._gathered(value) for key, value in state.items()}
        whole = self.full_tensor(state)
        if whole is state:
            return state
        return whole.cpu() if self.rank == 0 else None

    def full_tensor(self, value: Any) -> Any:
        """Return the whole tensor of a sharded one, in every process, and any other value as it is."""
        return value.full_tensor() if self.sharded and hasattr(value, "full_tensor") else value


def _part(value: Any, like: Tensor) -> Any:
    """Return this process's part of a whole tensor, sharded like a parameter of the same shape; other values as they
    are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    assert isinstance(like, DTensor), type(like)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def join(sharded: bool = False) -> Processes:
    """Join the process group that torchrun's environment variables describe, once, and return it.

    Without torchrun this process is the only one. The group is left when the process exits.

    Args:
        sharded: see `Processes`; ignored for a single process.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes()
    if not dist.is_initialized():
        both = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(both, timeout=timedelta(hours=6))
        atexit.register(_leave)
    if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return Processes(dist.get_rank(), count, sharded)


def _leave() -> None:
    """Leave the process group while the interpreter still runs: later, gloo's threads abort the process if they free
    the tensor of a last exchange."""
    if dist.is_initialized():
        dist.destroy_process_group()
