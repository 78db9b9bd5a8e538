"""Low-rank changes (LoRA, arXiv 2106.09685) to a diffusers network, by peft: its layers, its choice of targets, and the
file that any diffusers pipeline loads.

A changed layer answers W x + B A x. It holds the frozen layer itself, so there is no second copy of the weights, nor a
gradient of their size. The changed layers stand in the network only while it answers for the adapter: at any other time
the network is what it was, its keys too, and several adapters may share it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sds3d.runtime.files import replacing

FILE = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder
NAME = "critic"
# the projections of every attention; the last four are of transformers that attend to image and words at once
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class Adapter(nn.Module):
    """Stands for a network under changes of its own; its parameters and its state are the changes alone.

    B starts at zero, so it starts equal to the network, bit for bit.

    Args:
        network: of diffusers; its weights get no gradient here.
        rank: of every change.
        rng: of A's initial values.
        targets: names of linear and convolutional layers, or their ends; () is every attention's projections.
        dtype: of the changes.
        checkpointing: recompute the network's blocks in the backward pass.

    Raises:
        ValueError: a target that no layer is called by.
    """

    def __init__(
        self,
        network: nn.Module,
        rank: int,
        rng: torch.Generator,
        targets: tuple[str, ...] = (),
        dtype: torch.dtype = torch.float32,
        checkpointing: bool = False,
    ):
        super().__init__()
        self._network: list[Any] = [network]  # in a list: not a submodule, so not in this module's state or parameters
        self.names, self.checkpointing = layers_called(network, targets), checkpointing
        self._layers = _inject(network, self.names, rank)
        self.down = nn.ModuleList(layer.lora_A[NAME].to(dtype) for layer in self._layers)
        self.up = nn.ModuleList(layer.lora_B[NAME].to(dtype) for layer in self._layers)
        for down, up in zip(self.down, self.up, strict=True):
            weight = down.get_parameter("weight")
            weight.data.copy_(torch.randn(weight.shape, generator=rng) / math.sqrt(weight[0].numel()))
            nn.init.zeros_(up.get_parameter("weight"))

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Inside, the changed layers are in their places in the network; afterwards what was there before."""
        network = self._network[0]
        places = [(network.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in self.names]
        before = [place._modules[name] for place, name in places]
        try:
            for (place, name), layer in zip(places, self._layers, strict=True):
                place._modules[name] = layer
            yield
        finally:
            for (place, name), layer in zip(places, before, strict=True):
                place._modules[name] = layer

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """As the network's. In its own precision, as it answers without changes; these compute in theirs."""
        network = self._network[0]
        plain = torch.autocast(next(self.down.parameters()).device.type, enabled=False)
        with self.changed(), plain, self._recomputing() if torch.is_grad_enabled() else nullcontext():
            return network(*arguments, **named)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Inside, the network's blocks keep nothing for the backward pass, which finds the changed layers again."""
        if not self.checkpointing:
            yield
            return
        again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), self.changed()))
        try:
            self._network[0].enable_gradient_checkpointing(again)
            yield
        finally:
            self._network[0].disable_gradient_checkpointing()

    def named_weights(self) -> dict[str, Tensor]:
        """The changes as peft names them, on the CPU."""
        parts = zip(self.names, self.down, self.up, strict=True)
        named = {f"{n}.lora_{k}.weight": layer for n, a, b in parts for k, layer in (("A", a), ("B", b))}
        return {name: layer.get_parameter("weight").detach().cpu().contiguous() for name, layer in named.items()}


def layers_called(network: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Full names of the linear and convolutional layers whose names are, or end in, the targets.

    Args:
        targets: () is every attention's projections, of those that there are.

    Raises:
        ValueError: a target that no layer is called by.
    """
    there = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    found = {end: [n for n in there if f".{n}".endswith(f".{end}")] for end in targets or ATTENTION}
    missing = [end for end, names in found.items() if not names] if targets else []
    if missing or not any(found.values()):
        said = ", ".join(missing) or "left out, which is attention's projections"
        ends = dict.fromkeys(end for name in there for end in re.findall(r"[^.]+(?:\.\d+)*$", name))
        raise ValueError(
            f"critic.targets is {said}; no layer of this {type(network).__name__} is called that: give the ends of "
            f"names, such as {', '.join(ends)}, or a whole name, such as {there[len(there) // 2]}"
        )
    wanted = {name for names in found.values() for name in names}
    return [name for name in there if name in wanted]


def _inject(network: nn.Module, names: list[str], rank: int) -> list[Any]:
    """peft's layers around those of these names, taken out of the network again; lora_A and lora_B hold the changes."""
    from peft import LoraConfig, inject_adapter_in_model

    before = {name: network.get_submodule(name) for name in names}
    try:
        with torch.random.fork_rng(devices=[]):  # it draws first weights from the global stream
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), network, NAME)
        return [network.get_submodule(name) for name in names]
    finally:
        for name, layer in before.items():
            network.set_submodule(name, layer)
        vars(network).pop("peft_config", None)


def save(adapter: Adapter, pipe: Any, part: str, folder: Path) -> Path | None:
    """Write an adapter as plain diffusers loads it: ``pipe.load_lora_weights(folder)``.

    Args:
        pipe: a pipeline of the kind that will load it.
        part: the network's name in it.

    Returns:
        The file; None for a pipeline that loads none (DDPM's).

    Raises:
        ValueError: the disk says no.
    """
    if not hasattr(pipe, "save_lora_weights"):
        return None
    with replacing(folder / FILE) as path:
        weights = {f"{part}_lora_layers": adapter.named_weights()}
        pipe.save_lora_weights(path.parent, weight_name=path.name, **weights)
    return folder / FILE
