"""The most memory that was used at once: of a GPU, or of this process."""

from __future__ import annotations

from pathlib import Path

import torch


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
