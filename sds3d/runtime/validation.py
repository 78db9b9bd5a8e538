"""Check that the numbers of a dataclass lie in the ranges of its annotations (see `ranges.Within`)."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any

from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import STEPS, Within, shown

_STEPS = Within(0, STEPS)


def check(config: Any, path: str = "") -> None:
    """Check the ranges of all numbers in a nested dataclass. Raise ValueError, which names the key, for a wrong one."""
    hints = hints_of(type(config))
    for f in dataclasses.fields(config):
        key, value = f"{path}.{f.name}" if path else f.name, getattr(config, f.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Ramp):
            check(value, key)
        else:
            require_within(hints[f.name], value, key)


def require_within(kind: Any, value: Any, key: str) -> None:
    """Raise ValueError if a number is outside the range in its type's annotation."""
    parts = typing.get_args(kind)
    if isinstance(value, Mapping) and typing.get_origin(kind) is dict:
        for name, item in value.items():
            require_within(parts[1], item, f"{key}.{name}")
        return
    metadata = [data for part in (kind, *parts) if typing.get_origin(part) is Annotated for data in part.__metadata__]
    for within in (data for data in metadata if isinstance(data, Within)):
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            _require(number, within, key)


def _require(value: Any, within: Within, key: str) -> None:
    """Raise ValueError if a number, or a ramp's value or step, is out of range."""
    if isinstance(value, Ramp):
        for number in (value.v0, value.v1):
            _require(number, within, key)
        for step in (value.start, value.end):
            _require(step, _STEPS, f"a step of {key}")
    elif isinstance(value, int | float) and value not in within:
        raise ValueError(f"{key} is {shown(value)}; give {within}")


@cache
def hints_of(cls: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, with their ranges."""
    return typing.get_type_hints(cls, include_extras=True)
