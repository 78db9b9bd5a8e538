"""Converts plain values, as in YAML, to typed dataclasses and back. Errors name the key and the nearest known one.

A field may be a bool, int, float, str, Ramp, another dataclass, a tuple or dict of those, or None in place of one.
A Ramp is written as a number or as [start step, value, value, end step]. The type of a number may have a range, as in
``Annotated[int, Within(1, 8)]``; `build` and `check` refuse numbers outside it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import shown
from sds3d.runtime.validation import hints_of, require_within

T = TypeVar("T")
LONGEST = 10_000  # most characters of a text
_PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def build(cls: type[T], values: Mapping[str, Any], path: str = "", known: Iterable[str] | None = None) -> T:
    """Build a dataclass from a mapping. Fields that are left out keep their defaults.

    Args:
        cls: the dataclass.
        values: field name -> value, nested.
        path: the dotted key of the mapping in the whole config, for messages.
        known: all dotted keys, for suggestions in messages; by default those of ``cls``.

    Raises:
        ValueError: a key is unknown, a value has the wrong type, or the dataclass refuses it.
    """
    known = tuple(keys(cls, path) if known is None else known)
    hints = hints_of(cls)
    kind: Any = cls
    fields = {f.name for f in dataclasses.fields(kind) if f.init}
    arguments = {}
    for name, value in values.items():
        key = f"{path}.{name}" if path else str(name)
        if name not in fields:
            raise ValueError(f"unknown key {shown(key)}; {nearest(key, known)}")
        arguments[name] = convert(hints[name], value, key, known)
    return cls(**arguments)


def convert(kind: Any, value: Any, key: str, known: tuple[str, ...] = ()) -> Any:
    """Convert ``value`` to the type ``kind``. Raises ValueError that names ``key``."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        converted = convert(parts[0], value, key, known)
        require_within(kind, converted, key)
        return converted
    if origin in (typing.Union, types.UnionType):
        return _convert_union(parts, value, key, known)
    if origin is typing.Literal:
        if value not in parts:
            raise ValueError(f"{key} is {shown(value)}; {nearest(str(value), [str(p) for p in parts])}")
        return value
    if kind is Ramp:
        try:
            return Ramp.parse(value)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if not isinstance(value, Mapping):
            first = dataclasses.fields(kind)[0].name
            raise ValueError(f"{key} is {shown(value)}; give its parts, as in {key}.{first}=...")
        return build(kind, value, key, known)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{key} is {shown(value)}; give its parts, as in {key}.NAME=...")
        return {str(k): convert(parts[1], v, f"{key}.{k}", known) for k, v in value.items() if v is not None}
    if origin is tuple:
        return _convert_tuple(parts, value, key, known)
    if kind is Any:
        return value
    return _convert_plain(kind, value, key)


def _convert_union(parts: tuple, value: Any, key: str, known: tuple[str, ...]) -> Any:
    """Convert to a union: Ramp | float gives a Ramp; X | None accepts None."""
    if value is None and type(None) in parts:
        return None
    if Ramp in parts:
        return convert(Ramp, value, key, known)
    last: ValueError | None = None
    for part in parts:
        if part is type(None):
            continue
        try:
            return convert(part, value, key, known)
        except ValueError as error:
            last = last or error
    assert last is not None, parts
    raise last


def _convert_tuple(parts: tuple, value: Any, key: str, known: tuple[str, ...]) -> tuple:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ValueError(f"{key} is {shown(value)}; give a list, as in {key}=[1,2]")
    items = list(value)
    kinds = [parts[0]] * len(items) if parts[-1] is Ellipsis else list(parts)
    if len(items) != len(kinds):
        raise ValueError(f"{key} is {shown(items)}; give {len(kinds)} values")
    return tuple(convert(k, v, f"{key}[{i}]", known) for i, (k, v) in enumerate(zip(kinds, items, strict=True)))


def _convert_plain(kind: type, value: Any, key: str) -> Any:
    assert kind in _PLAIN, f"{key} has type {kind}, which a config cannot hold"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is str and number and isinstance(value, int):
        return str(value)  # a prompt such as 3, which YAML reads as a number
    if kind is float and number:
        if isinstance(value, int) and abs(value) >= 10**300:
            return math.inf if value > 0 else -math.inf
        return float(value)
    if kind is int and number and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{key} is {shown(value)}; give {_PLAIN[kind]}")
    if isinstance(value, str) and any(c == "\0" or 0xD800 <= ord(c) < 0xE000 for c in value):  # cannot be stored
        raise ValueError(f"{key} is {shown(value)}; give text without NUL characters and lone surrogates")
    if isinstance(value, str) and len(value) > LONGEST:
        raise ValueError(f"{key} has {len(value)} characters; give {LONGEST} at most")
    return value


def require_maps(cls: type, values: Mapping[str, Any], path: str = "") -> None:
    """Raise ValueError, which names the key, if a field for a dataclass or a dict has a value that is no mapping."""
    hints = hints_of(cls)
    for name, value in values.items():
        kind = hints.get(name)
        is_class = isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind is not Ramp
        if not (is_class or typing.get_origin(kind) is dict):
            continue
        key = f"{path}.{name}" if path else name
        if not isinstance(value, Mapping):
            convert(kind, value, key)
        elif is_class and isinstance(kind, type):
            require_maps(kind, value, key)


def plain(value: Any) -> Any:
    """Convert a value to plain values: a dataclass to a dict, a tuple to a list, a Ramp to a number or four numbers."""
    if isinstance(value, Ramp):
        if value.v0 == value.v1:
            return value.v0
        return [value.start, value.v0, value.v1, value.end]
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested mappings. Values of ``above`` replace those of ``below``."""
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merge(out[key], value) if both else value
    return out


def keys(cls: type, path: str = "") -> list[str]:
    """Return the dotted keys of all fields of a nested dataclass."""
    names = []
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        key = f"{path}.{f.name}" if path else f.name
        names.append(key)
        kind = hints[f.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind is not Ramp:
            names += keys(kind, key)
    return names


def nearest(word: str, known: Iterable[str]) -> str:
    """Suggest known words for an unknown one: "did you mean a or b?"; if none is similar, list the known words."""
    known = list(dict.fromkeys(known))
    leaf = word.rpartition(".")[2]
    same_leaf = [k for k in known if k.rpartition(".")[2] == leaf]
    close = [k for k in known if len(leaf) > 2 and k.startswith(word)][:2]  # the word is an abbreviation
    close = close or difflib.get_close_matches(word, known, n=2, cutoff=0.6)
    if not (same_leaf or close):
        by_leaf = {k.rpartition(".")[2]: k for k in known}
        close = [by_leaf[k] for k in difflib.get_close_matches(leaf, by_leaf, n=2, cutoff=0.6)]
    similar = list(dict.fromkeys(same_leaf + close))
    if similar:
        return f"did you mean {' or '.join(similar[:3])}?"
    listed = [k for k in known if "." not in k] or known
    return f"there is {', '.join(listed)}"
