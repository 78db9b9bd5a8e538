"""Refuses what lies outside the ranges that stand beside a dataclass's fields (see `ranges.Within`)."""

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
    """Refuse numbers outside their ranges in a dataclass of dataclasses. Raises ValueError that names the key."""
    hints = hints_of(type(config))
    for f in dataclasses.fields(config):
        key, value = f"{path}.{f.name}" if path else f.name, getattr(config, f.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Ramp):
            check(value, key)
        else:
            require_within(hints[f.name], value, key)


def require_within(kind: Any, value: Any, key: str) -> None:
    """Refuse numbers outside the ranges that a type's annotations say."""
    parts = typing.get_args(kind)
    if isinstance(value, Mapping) and typing.get_origin(kind) is dict:
        for name, one in value.items():
            require_within(parts[1], one, f"{key}.{name}")
        return
    marks = [mark for part in (kind, *parts) if typing.get_origin(part) is Annotated for mark in part.__metadata__]
    for within in (mark for mark in marks if isinstance(mark, Within)):
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            _require(number, within, key)


def _require(value: Any, within: Within, key: str) -> None:
    """Refuse one number, or a ramp whose values or steps are out of range."""
    if isinstance(value, Ramp):
        for number in (value.v0, value.v1):
            _require(number, within, key)
        for step in (value.start, value.end):
            _require(step, _STEPS, f"a step of {key}")
    elif isinstance(value, int | float) and value not in within:
        raise ValueError(f"{key} is {shown(value)}; give {within}")


@cache
def hints_of(cls: type) -> dict[str, Any]:
    """A dataclass's types, ranges included."""
    return typing.get_type_hints(cls, include_extras=True)
