"""What cameras can see of a density: optical depths to the outside along many directions, over a lattice.

Directions are those of the lattice with entries from -2 to 2: 98, at most 19 degrees from any other one. With
fewer (the 26 of entries from -1 to 1) the foot of a mug's wall, which only steep rays reach, counts as hidden. Depths
are summed layer by layer of the direction's main axis. A slope of 1/2 moves every second layer, so nothing is
interpolated.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

REACH = 2  # the largest entry of a direction
# A corner belongs to an opening if light passes through the scene along this many of the 49 lines through it. In the
# handle of the toybox's mug these are up to 17, in a gap that parts two bodies 8, in a bore as wide as a tenth of its
# length 1.
CROSSING = 3
HALF = math.log(2)  # the optical depth that half the light passes


class Sight(NamedTuple):
    """What cameras can see of the corners of a lattice.

    Args:
        buried: (R, R, R) float32, the second smallest optical depth from each corner to the outside.
        crossed: (R, R, R) bool, whether more than half the light passes along `CROSSING` lines through the corner, from
            one side of the scene to the other.
    """

    buried: np.ndarray
    crossed: np.ndarray

    def strided(self, step: int) -> Sight:
        """Return the same at every ``step``-th corner along each axis."""
        return Sight(*(values[::step, ::step, ::step] for values in self))


def sight(density: np.ndarray, voxel: float) -> Sight:
    """Return what cameras can see of a density.

    Args:
        density: (R, R, R) per scene unit, at corners that are ``voxel`` scene units apart.
    """
    least, second = np.full_like(density, np.inf), np.full_like(density, np.inf)
    depth, line, lines = np.empty_like(density), np.empty_like(density), np.zeros(density.shape, np.uint8)
    for one in directions():
        line.fill(0)
        for direction in (one, tuple(-d for d in one)):
            _depth(density, direction, voxel, depth)
            line += depth
            np.minimum(second, np.maximum(least, depth), out=second)  # a lucky path through foam is no opening
            np.minimum(least, depth, out=least)
        lines += line < HALF
    return Sight(second, lines >= CROSSING)


def directions() -> list[tuple[int, ...]]:
    """Return one of each pair of opposite directions, as integers without a common divisor."""
    every = itertools.product(range(-REACH, REACH + 1), repeat=3)
    return [d for d in every if d > (0, 0, 0) and math.gcd(*d) == 1]


def _length(direction: tuple[int, ...]) -> float:
    """Return the length of a direction's line between two layers of its main axis, in voxels."""
    return math.sqrt(sum(d * d for d in direction)) / max(map(abs, direction))


def _depth(density: np.ndarray, direction: tuple[int, ...], voxel: float, out: np.ndarray) -> None:
    """Write to ``out`` the optical depth of the line that arrives at each corner along a direction."""
    main = max(range(3), key=lambda axis: abs(direction[axis]))
    order = [main, *(axis for axis in range(3) if axis != main)]
    sign = 1 if direction[main] > 0 else -1
    layers, depth = density.transpose(order)[::sign], out.transpose(order)[::sign]
    slopes = [direction[axis] / abs(direction[main]) for axis in order[1:]]
    length = np.float32(voxel * _length(direction))
    depth[0] = 0
    total = np.empty_like(layers[0])
    for k in range(1, len(layers)):
        moves = [math.floor(k * slope) - math.floor((k - 1) * slope) for slope in slopes]
        to, since = zip(*map(_shifts, moves))
        np.multiply(layers[k - 1], length, out=total)
        total += depth[k - 1]
        if any(moves):
            depth[k] = 0
        depth[k][to] = total[since]


def _shifts(step: int) -> tuple[slice, slice]:
    """Return the target and the source slice of an axis that is shifted by -1, 0 or 1."""
    return {0: (slice(None), slice(None)), 1: (slice(1, None), slice(-1)), -1: (slice(-1), slice(1, None))}[step]
