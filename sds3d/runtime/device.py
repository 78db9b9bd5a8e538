"""The choice of the torch device."""

from __future__ import annotations

import torch


def pick_device(name: str) -> torch.device:
    """Return the device of this name; "auto" is CUDA if it is available, else the CPU.

    Raises:
        ValueError: torch cannot compute on this device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails on the meta device, which has no values
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # kernels and events use the current device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        name = name if len(name) < 60 else f"{name[:50]} ..."
        if name.startswith("cuda"):
            raise ValueError(
                f"device {name!r} is not usable here: torch {torch.__version__} sees no such GPU; give "
                "device=cpu (--device cpu), or install torch's CUDA build"
            ) from error
        raise ValueError(f"device {name!r} is not usable here; give auto, cpu or cuda") from error
    return device
