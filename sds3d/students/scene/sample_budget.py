"""The memory of a training render: the number of rays rendered at once, and the rows allocated for their samples.

The number of packed samples depends on the scene, and only the GPU knows it; reading it makes the host wait for all
queued work. So a render allocates somewhat more rows than the last count that has arrived, and leaves the rest empty.
If there were too few rows, the last rays of one step lose samples, and the number of rows doubles.
"""

from __future__ import annotations

import torch

from sds3d.ops import Samples

SLACK = 1.5  # rows allocated for each sample of the last known count
GRAIN = 4096  # the number of rows is a multiple of this, so that torch's allocator can reuse blocks
CPU_BYTES = 2 * 2**30  # memory of a render with gradients on a CPU, at most; on a GPU a quarter of it


def rays_at_a_time(device: torch.device, samples: int, inputs: int, hidden: int) -> int:
    """Return how many rays a render with gradients may process at once, given the device's memory.

    Args:
        samples: sample steps along one side of the box, about as many as a ray keeps.
        inputs, hidden: widths of the field's layers.
    """
    memory = CPU_BYTES
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory // 4
    return rays_within(memory, samples, inputs, hidden)


def rays_within(memory: int, samples: int, inputs: int, hidden: int) -> int:
    """Return how many rays fit into ``memory`` bytes; the other arguments are as for ``rays_at_a_time``."""
    sample = 4 * (3 * (inputs + hidden) + 65)  # bytes of values, gradients and intermediate values, in float32
    return max(4096, memory // (samples * sample))


class SampleBudget:
    """The number of rows to allocate for the next render's samples, estimated from earlier renders."""

    def __init__(self):
        self._rows: int | None = None
        self._count: torch.Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def rows(self) -> int | None:
        """Return the ``capacity`` for `ops.reference.march`: None the first time, when the samples are counted."""
        if self._rows is not None and self._count is not None and (self._arrived is None or self._arrived.query()):
            count, self._count = int(self._count), None
            self._rows = 2 * self._rows if count >= self._rows else _rounded(count)
        return self._rows

    def saw(self, samples: Samples) -> None:
        """Record the samples of a render with capacity ``rows()``, without waiting for their count."""
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
    """Return the rows for a count of samples, with slack."""
    return (int(count * SLACK) // GRAIN + 1) * GRAIN
