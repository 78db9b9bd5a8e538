"""Which numbers a setting takes: said once, beside the field, as in ``rank: Annotated[int, Within(1, 512)] = 8``.

`sds3d.config.typed` refuses what is outside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

STEPS = 10_000_000  # of a run, at most


@dataclass(frozen=True)
class Within:
    """A range with both its ends; ``above`` leaves the lower end out, ``also`` is one number more that means something.

    For a ``Ramp`` it is the range of the values; its steps lie from 0 to STEPS.
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


SCALES = Within(-1e4, 1e4)  # of guidance


def shown(value: Any) -> str:
    """A value for a message: cut in its middle where it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return f"{'-' * (value < 0)}a number of {int(value.bit_length() * math.log10(2)) + 1} digits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:120]} ... {text[-40:]}"
