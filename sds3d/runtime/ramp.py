"""Values that change with the step: one type for learning rates, weights, guidance scales and t-ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sds3d.runtime.ranges import shown


@dataclass(frozen=True)
class Ramp:
    """A value that goes linearly from ``v0`` at step ``start`` to ``v1`` at step ``end`` and is constant outside.

    With ``start == end`` the value jumps: it is ``v0`` before that step and ``v1`` from that step on.

    Raises:
        ValueError: a value is not finite, or ``end`` comes before ``start``.

    Examples:
        >>> ramp = Ramp(100, 1.0, 0.0, 200)
        >>> ramp(0), ramp(150), ramp(300)
        (1.0, 0.5, 0.0)
    """

    start: float
    v0: float
    v1: float
    end: float

    def __post_init__(self):
        values = (self.start, self.v0, self.v1, self.end)
        if not all(math.isfinite(v) for v in values):
            raise ValueError(f"a ramp needs four finite numbers (start, v0, v1, end), got {values}")
        if self.end < self.start:
            raise ValueError(f"a ramp (start, v0, v1, end) must end after it starts, got {values}")

    def __call__(self, step: float) -> float:
        """Return the value at a step."""
        if step >= self.end:
            return self.v1
        if step <= self.start:
            return self.v0
        return self.v0 + (self.v1 - self.v0) * (step - self.start) / (self.end - self.start)

    @classmethod
    def constant(cls, value: float) -> Ramp:
        """Return a ramp with the same value at every step."""
        return cls(0.0, float(value), float(value), 0.0)

    @classmethod
    def parse(cls, value: Ramp | float | Sequence[float]) -> Ramp:
        """Return a ramp, given a ramp, one number (constant), or four: start step, value, value, end step.

        Raises:
            ValueError: the value is none of these.
        """
        if isinstance(value, Ramp):
            return value
        items = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
        numbers = [v for v in items if isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e300]
        parts = [float(v) for v in numbers] if len(numbers) == len(items) else []
        if len(parts) == 1:
            return cls.constant(parts[0])
        if len(parts) == 4:
            return cls(*parts)
        raise ValueError(f"give a number, or a ramp [start step, value, value, end step]; got {shown(value)}")
