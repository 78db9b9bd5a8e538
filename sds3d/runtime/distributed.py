"""One batch over several processes (torchrun): each draws the whole batch's chances and keeps its own rows.

So every process has the same random stream, and the same batch gives the same steps however many share it, but for the
order in which gradients are summed. Each process keeps all weights, and `Processes.average` averages the gradients (as
DDP does), or a part of every weight, its gradient and its optimiser's state (FSDP2: torch's fully_shard, which gathers
a block's weights when it runs, and averages the gradients itself).
"""

from __future__ import annotations

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
    """A process's part of every batch.

    Args:
        rank: of this process, from 0.
        world_size: how many processes there are.
        sharded: whether each keeps only a part of the weights that are trained (FSDP).
    """

    rank: int = 0
    world_size: int = 1
    sharded: bool = False

    def of(self, whole: int) -> int:
        """Rows of this process in a batch of ``whole``. Raises ValueError where it cannot be shared evenly."""
        if whole % self.world_size:
            raise ValueError(
                f"a batch of {whole} cannot be shared by {self.world_size} processes; give a multiple of that"
            )
        return whole // self.world_size

    def rows(self, whole: Tensor) -> Tensor:
        """This process's rows of something drawn for the whole batch."""
        return whole.chunk(self.world_size)[self.rank] if self.world_size > 1 else whole

    def randn(self, shape: tuple[int, ...], rng: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal noise for this process's rows, ``shape``."""
        return self.rows(torch.randn(self._all(shape), generator=rng, device=rng.device, dtype=dtype))

    def rand(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Numbers in [0, 1) for this process's rows, ``shape``."""
        return self.rows(torch.rand(self._all(shape), generator=rng, device=rng.device))

    def randint(self, high: int, count: int, rng: torch.Generator) -> Tensor:
        """Whole numbers below ``high`` for this process's ``count`` rows."""
        return self.rows(torch.randint(high, (count * self.world_size,), generator=rng))

    def _all(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] * self.world_size, *shape[1:])

    def wait(self) -> None:
        """Until every process is here."""
        if self.world_size > 1:
            dist.barrier()

    def agree(self, wish: bool) -> bool:
        """Whether any process wishes it; every process gets the same answer."""
        if self.world_size == 1:
            return wish
        wishes = torch.tensor(float(wish))
        dist.all_reduce(wishes)
        return bool(wishes > 0)

    @torch.no_grad()
    def average(self, parameters: Iterable[Tensor]) -> None:
        """Give every process the mean of all processes' gradients. FSDP has done that to sharded ones."""
        if self.world_size == 1 or self.sharded:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat)
        flat /= self.world_size
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(mean.view_as(grad))

    def shard(self, module: nn.Module) -> None:
        """Leave this process its part of a module's weights, where weights are shared; before its optimiser is made.

        The module cannot be copied any more. All processes must run it together, and together ask for its state_dict(),
        which is the same as without sharding in the first of them and holds None in the others; load_state_dict() takes
        the whole weights.
        """
        if not self.sharded:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        device = next(module.parameters()).device.type
        mesh = init_device_mesh(device, (self.world_size,))
        # FSDP takes no other memory format, which torch's own types of Module.to leave out
        module.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
        blocks = [part for parts in reversed(lists) for part in parts if not isinstance(part, nn.ModuleList)]
        for part in (*(block for block in blocks if any(block.children())), module):
            # freed after every pass, or a pass after the next step would find the weights of the one before
            sharded = fully_shard(part, mesh=mesh, reshard_after_forward=True)
            sharded.set_force_sum_reduction_for_comms(device == "cpu")  # gloo knows no mean
        if hasattr(module, "features"):
            register_fsdp_forward_method(module, "features")
        module.register_state_dict_post_hook(lambda _, state, *rest: state.update(self._gathered(state)))
        own = dict(module.named_parameters())
        module.register_load_state_dict_pre_hook(
            lambda _, state, *rest: state.update({k: _part(v, own[k]) for k, v in state.items() if k in own})
        )

    def shard_states(self, optimiser: torch.optim.Optimizer) -> None:
        """Make state_dict() and load_state_dict() of a sharded module's optimiser as those of the module."""
        if not self.sharded:
            return
        own = [p for group in optimiser.param_groups for p in group["params"]]

        def cut(_: Any, state: dict[str, Any]) -> dict[str, Any]:
            parts = {i: {k: _part(v, own[i]) for k, v in moments.items()} for i, moments in state["state"].items()}
            return {"state": parts, "param_groups": [{**group, **many} for group in state["param_groups"]]}

        def whole(_: Any, state: dict[str, Any]) -> dict[str, Any]:
            groups = [{**group, "foreach": None} for group in state["param_groups"]]
            return {"state": self._gathered(state["state"]), "param_groups": groups}

        # torch updates all plain weights of a GPU at once, and sharded ones one by one where it is not told
        many = {"foreach": not optimiser.defaults["fused"]}
        for group in optimiser.param_groups:
            group |= many
        optimiser.register_state_dict_post_hook(whole)
        optimiser.register_load_state_dict_pre_hook(cut)

    def _gathered(self, state: Any) -> Any:
        """A state with whole tensors on the CPU in the place of sharded ones; None in all processes but the first."""
        if isinstance(state, dict):
            return {key: self._gathered(value) for key, value in state.items()}
        whole = self.whole(state)
        if whole is state:
            return state
        return whole.cpu() if self.rank == 0 else None

    def whole(self, value: Any) -> Any:
        """What is sharded, put together in every process; anything else as it is."""
        return value.full_tensor() if self.sharded and hasattr(value, "full_tensor") else value


def _part(value: Any, like: Tensor) -> Any:
    """This process's part of a whole tensor, sharded as a parameter of the same shape is; anything else as it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    assert isinstance(like, DTensor), type(like)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def join(sharded: bool = False) -> Processes:
    """This process: the only one, or as torchrun's environment says; joins the others where it has not yet.

    Args:
        sharded: see `Processes`; one process alone has nothing to shard.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes()
    if not dist.is_initialized():
        both = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(both, timeout=timedelta(hours=6))
    if int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return Processes(dist.get_rank(), count, sharded)
