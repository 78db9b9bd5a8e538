"""The range of numbers that a setting takes, written beside the field: ``rank: Annotated[int, Within(1, 512)] = 8``.

`sds3d.config.typed` raises ValueError for a value outside the range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

STEPS = 10_000_000  # the largest number of steps of a run


@dataclass(frozen=True)
class Within:
    """A range of accepted numbers. For a `Ramp` it is the range of the values; the steps are in [0, STEPS].

    Args:
        low, high: the ends, both accepted.
        above: whether ``low`` itself is refused.
        also: one more accepted number, which has a meaning of its own.
    """

    low: float
    high: float
    above: bool = False
    also: float | None = None

    def __contains__(self, value: float) -> bool:
        if not isinstance(value, int) and not math.isfinite(value):
            return False
        return value == self.also or ((self.low < value if self.above else self.low <= value) and value <= self.high)

    def __str__(self) -> str:
        low, high = (f"{end:d}" if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        text = f"a number above {low}, up to {high}" if self.above else f"{low} to {high}"
        return text if self.also is None else f"{text}, or {self.also:g}"


SCALES = Within(-1e4, 1e4)  # of guidance scales


def shown(value: Any) -> str:
    """Return a value as text for an error message, shortened in the middle if it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return f"{'-' * (value < 0)}a number of {int(value.bit_length() * math.log10(2)) + 1} digits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:120]} ... {text[-40:]}"
