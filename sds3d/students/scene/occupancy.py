"""The occupancy grid: a coarse grid of occupied cells that lets the renderer skip empty space.

Every ``every`` steps the density is measured at one random point in each cell, and a decaying running maximum is
updated (Instant-NGP, arXiv 2201.05989, appendix C):

    ema <- max(decay * ema, density(random point in the cell))
    occupied = ema > threshold, grown by ``grow`` cells

Growing keeps a rim of near-empty cells around the object: without it nothing outside could receive a gradient and
appear. Nearly half of all samples would lie in the rim, so a training render visits only a random fraction ``rim`` of
its cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sds3d.runtime.ranges import STEPS, Within
from sds3d.runtime.transfer import onto
from sds3d.students.scene.field import Field


@dataclass(frozen=True)
class OccupancyConfig:
    """Settings of the occupancy grid.

    Args:
        resolution: cells along each side of the box.
        every: steps between updates.
        decay: factor of the running maximum per update.
        opacity: a cell is empty if one sample step in it has a lower opacity than this.
        grow: cells by which the occupied region grows.
        rim: fraction of the rim's cells that one training render visits, at random; above 0, up to 1.
    """

    resolution: Annotated[int, Within(4, 256)] = 32
    every: Annotated[int, Within(1, STEPS)] = 8
    decay: Annotated[float, Within(0, 1)] = 0.6
    opacity: Annotated[float, Within(0, 1, above=True)] = 0.03
    grow: Annotated[int, Within(0, 8)] = 1
    rim: Annotated[float, Within(0, 1, above=True)] = 0.25

    def __post_init__(self):
        if not 4 <= self.resolution <= 256:
            raise ValueError(f"occupancy.resolution is {self.resolution}; give 4 to 256 cells a side (32 is usual)")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"occupancy.decay is {self.decay}; give a factor from 0 to 1 (0.6)")
        if not 0 <= self.grow <= 8:
            raise ValueError(f"occupancy.grow is {self.grow}; give 0 to 8 cells (1)")
        if self.every < 1:
            raise ValueError(f"occupancy.every is {self.every}; give at least 1 step between updates")
        if not 0 < self.opacity < 1:
            raise ValueError(f"occupancy.opacity is {self.opacity}; give an opacity between 0 and 1 (0.03)")
        if not 0 < self.rim <= 1:
            raise ValueError(f"occupancy.rim is {self.rim}; give a fraction above 0, up to 1 (0.25)")


class Occupancy(nn.Module):
    """The grid of occupied cells and its running maximum.

    Args:
        config: resolution and update rule.
        step_size: length of one sample step in scene units, which converts ``opacity`` into a density.
    """

    ema: Tensor  # (G, G, G), indexed x, y, z
    cells: Tensor  # (G, G, G) bool

    def __init__(self, config: OccupancyConfig, step_size: float):
        super().__init__()
        self.config = config
        self.threshold = -math.log1p(-config.opacity) / step_size
        shape = (config.resolution,) * 3
        self.register_buffer("ema", torch.zeros(shape))
        self.register_buffer("cells", torch.ones(shape, dtype=torch.bool))

    @torch.no_grad()
    def update(self, field: Field, step: int, rng: torch.Generator) -> bool:
        """Measure every cell once if an update is due at this step; return whether it was."""
        if step % self.config.every:
            return False
        size, device = self.config.resolution, self.ema.device
        axis = torch.arange(size, dtype=torch.float32)
        corners = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)  # (G^3, 3)
        points = (corners + torch.rand(corners.shape, generator=rng)) * (2 / size) - 1
        density = field.density(onto(points, device)).view_as(self.ema)
        self.ema.mul_(self.config.decay)
        torch.maximum(self.ema, density, out=self.ema)
        self._mark()
        return True

    def _mark(self) -> None:
        """Rebuild ``cells`` from ``ema``."""
        occupied = self.ema > self.threshold
        occupied = occupied | ~occupied.any()  # with no occupied cell nothing could learn: mark all cells
        if self.config.grow:
            width = 2 * self.config.grow + 1
            grown = F.max_pool3d(occupied[None, None].float(), width, stride=1, padding=self.config.grow)
            occupied = grown[0, 0] > 0
        self.cells.copy_(occupied)

    def thinned(self, rng: torch.Generator) -> Tensor:
        """Return the cells that one training render visits, (G, G, G) bool: all dense ones and a random part of the
        rim."""
        chosen = torch.rand(self.cells.shape, generator=rng) < self.config.rim
        return self.cells & ((self.ema > self.threshold) | onto(chosen, self.cells.device))

    def at(self, points: Tensor) -> Tensor:
        """Return whether the cells of points (N, 3) in the box are occupied, (N,) bool."""
        size = self.config.resolution
        x, y, z = ((points + 1) * (size / 2)).long().clamp_(0, size - 1).unbind(-1)
        return self.cells[x, y, z]

    def occupied_fraction(self) -> float:
        """Return the fraction of the cells that are occupied, 0 to 1."""
        return self.cells.float().mean().item()
