"""Low-rank changes (LoRA, arXiv 2106.09685) to a diffusers network, with peft's layers, targets and file format.

A changed layer computes W x + B A x. It refers to the frozen layer itself, so there is no second copy of the weights
and no gradient of their size. The changed layers are in the network only during a forward of the adapter. At any other
time the network and its keys are unchanged, so several adapters can share it.
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

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
NAME = "critic"
# the projections of every attention; the last four occur in transformers with joint attention to image and words
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class Adapter(nn.Module):
    """A network with low-rank changes. Its parameters and its state are the changes alone.

    B starts at zero, so the outputs equal the network's at first, bit for bit.

    Args:
        network: a diffusers network; its weights get no gradient here.
        rank: rank of every change.
        rng: generator of A's initial values.
        targets: names of linear and convolutional layers, or the ends of names; () is the projections of every
            attention.
        dtype: dtype of the changes.
        checkpointing: recompute the network's blocks in the backward pass.

    Raises:
        ValueError: a target matches no layer.
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
        """Put the changed layers into the network; restore the original layers on exit."""
        network = self._network[0]
        parents = [(network.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in self.names]
        originals = [parent._modules[name] for parent, name in parents]
        try:
            for (parent, name), layer in zip(parents, self._layers, strict=True):
                parent._modules[name] = layer
            yield
        finally:
            for (parent, name), layer in zip(parents, originals, strict=True):
                parent._modules[name] = layer

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Call the network with the changed layers, without autocast: each layer computes in its own dtype."""
        network = self._network[0]
        no_autocast = torch.autocast(next(self.down.parameters()).device.type, enabled=False)
        with self.changed(), no_autocast, self._recomputing() if torch.is_grad_enabled() else nullcontext():
            return network(*arguments, **named)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Enable gradient checkpointing of the network; the recomputation uses the changed layers as well."""
        if not self.checkpointing:
            yield
            return
        recompute = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), self.changed()))
        try:
            self._network[0].enable_gradient_checkpointing(recompute)
            yield
        finally:
            self._network[0].disable_gradient_checkpointing()

    def named_weights(self) -> dict[str, Tensor]:
        """Return the changes by peft's names, on the CPU."""
        parts = zip(self.names, self.down, self.up, strict=True)
        named = {f"{n}.lora_{k}.weight": layer for n, a, b in parts for k, layer in (("A", a), ("B", b))}
        return {name: layer.get_parameter("weight").detach().cpu().contiguous() for name, layer in named.items()}


def layers_called(network: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Return the full names of the linear and convolutional layers whose names equal a target or end in it.

    Args:
        targets: () is the projections of every attention, those of ATTENTION that exist.

    Raises:
        ValueError: a target matches no layer.
    """
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    matches = {end: [name for name in layers if f".{name}".endswith(f".{end}")] for end in targets or ATTENTION}
    missing = [end for end, names in matches.items() if not names] if targets else []
    if missing or not any(matches.values()):
        given = ", ".join(missing) or "left out, which is attention's projections"
        ends = dict.fromkeys(end for name in layers for end in re.findall(r"[^.]+(?:\.\d+)*$", name))
        raise ValueError(
            f"critic.targets is {given}; no layer of this {type(network).__name__} is called that: give the ends of "
            f"names, such as {', '.join(ends)}, or a whole name, such as {layers[len(layers) // 2]}"
        )
    wanted = {name for names in matches.values() for name in names}
    return [name for name in layers if name in wanted]


def _inject(network: nn.Module, names: list[str], rank: int) -> list[Any]:
    """Return peft's layers around those of these names; lora_A and lora_B hold the changes. The network is restored."""
    from peft import LoraConfig, inject_adapter_in_model

    originals = {name: network.get_submodule(name) for name in names}
    try:
        with torch.random.fork_rng(devices=[]):  # peft draws initial weights from the global stream
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), network, NAME)
        return [network.get_submodule(name) for name in names]
    finally:
        for name, layer in originals.items():
            network.set_submodule(name, layer)
        vars(network).pop("peft_config", None)


def save(adapter: Adapter, pipe: Any, part: str, folder: Path) -> Path | None:
    """Write an adapter in the format of ``pipe.load_lora_weights(folder)`` of diffusers.

    Args:
        pipe: a pipeline of the kind that will load it.
        part: name of the network in the pipeline.

    Returns:
        The file; None for a pipeline without LoRA support (DDPM's).

    Raises:
        ValueError: the file cannot be written.
    """
    if not hasattr(pipe, "save_lora_weights"):
        return None
    with replacing(folder / FILE) as path:
        weights = {f"{part}_lora_layers": adapter.named_weights()}
        pipe.save_lora_weights(path.parent, weight_name=path.name, **weights)
    return folder / FILE
