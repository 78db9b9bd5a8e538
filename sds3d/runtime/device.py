"""Where a run computes: the device that a setting names, if it is here and computes."""

from __future__ import annotations

import torch


def pick_device(wanted: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises ValueError for a device that is not here."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device).item()  # which meta, where nothing is computed, cannot give
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # kernels and events go to the current one
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        wanted = wanted if len(wanted) < 60 else f"{wanted[:50]} ..."
        if wanted.startswith("cuda"):
            raise ValueError(
                f"device {wanted!r} is not usable here: torch {torch.__version__} sees no such GPU; give "
                "device=cpu (--device cpu), or install torch's CUDA build"
            ) from error
        raise ValueError(f"device {wanted!r} is not usable here; give auto, cpu or cuda") from error
    return device
