"""How much memory a training render takes: rays at a time, and room for their samples.

Packed samples are as many as the scene happens to have, and only the GPU knows how many those are; to ask it is to wait
for all it was told before. So a render makes room for somewhat more than the last counts that have come back, and the
rows too many stay empty. Where the room was too small, the last rays of one step lose samples, and the room doubles.
"""

from __future__ import annotations

import torch

from sds3d.ops import Samples

SLACK = 1.5  # room for so many times the last known count
GRAIN = 4096  # rooms are multiples of it: equal sizes are allocated once
CPU_BYTES = 2 * 2**30  # a render with gradients takes about so much at most on a CPU, and a quarter of a GPU


def rays_at_a_time(device: torch.device, samples: int, inputs: int, hidden: int) -> int:
    """How many rays a render with gradients may take at once, by the device's memory.

    Args:
        samples: steps along one side of the box, about as many as a ray keeps.
        inputs, hidden: widths of the field.
    """
    memory = CPU_BYTES
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory // 4
    return rays_within(memory, samples, inputs, hidden)


def rays_within(memory: int, samples: int, inputs: int, hidden: int) -> int:
    """As ``rays_at_a_time``, for so many bytes."""
    sample = 4 * (3 * (inputs + hidden) + 50)  # values, their gradients and what is between, in float32
    return max(4096, memory // (samples * sample))


class SampleBudget:
    """Rows for the next render's samples, learnt from earlier renders."""

    def __init__(self):
        self._rows: int | None = None
        self._count: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def rows(self) -> int | None:
        """What `ops.reference.march` wants as its room; None the first time, where it has to ask."""
        if self._rows is not None and self._count is not None and (self._arrived is None or self._arrived.query()):
            count, self._count = int(self._count), None
            self._rows = 2 * self._rows if count >= self._rows else _rounded(count)
        return self._rows

    def saw(self, samples: Samples) -> None:
        """Take note of a render made with ``rows()``, without waiting for its count."""
        if self._rows is None:
            self._rows = _rounded(len(samples.t))
        elif self._count is None:
            count = samples.offsets[-1]
            self._count = torch.empty_like(count, device="cpu", pin_memory=count.is_cuda)
            self._count.copy_(count, non_blocking=True)
            if count.is_cuda:
                self._arrived = torch.cuda.Event()
                self._arrived.record()


def _rounded(count: int) -> int:
    """Room for a count, with slack."""
    return (int(count * SLACK) // GRAIN + 1) * GRAIN
