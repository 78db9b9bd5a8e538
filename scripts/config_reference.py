"""Generate the configuration reference, in Markdown, from the dataclasses of sds3d/config/schema.py and the methods.

    python scripts/config_reference.py > settings.md

At every build of the site it replaces ``<!-- settings -->`` in docs/configuration.md (scripts/docs_site.py).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from typing import Any

from sds3d.config.load import default_method
from sds3d.config.meanings import meanings_of
from sds3d.config.schema import Config, DistillConfig, PaintConfig, RunConfig
from sds3d.config.typed import plain
from sds3d.distill.score import METHODS
from sds3d.runtime.ramp import Ramp
from sds3d.runtime.ranges import STEPS

KINDS = {"scenes": Config, "images": PaintConfig, "generators": DistillConfig}
POWERS = {STEPS: "10^7", 2**30: "2^30", 10**12: "10^12", 2**62 - 1: "2^62 - 1"}  # ends of ranges, readably
WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", Ramp: "number or ramp", Any: "a method"}


def reference() -> str:
    """Return the tables of all settings: of every run, of each kind of run, and of each method."""
    defaults = {name: plain(kind("a red mug")) | {"method": default_method(kind)} for name, kind in KINDS.items()}
    shared = {f.name for f in dataclasses.fields(RunConfig)}
    parts = ["## Every run", _section(RunConfig, "", defaults)]
    for name, kind in KINDS.items():
        own = {f.name for f in dataclasses.fields(kind)} - shared
        parts += [f"## Only {name}", _section(kind, "", {name: defaults[name]}, own)]
    parts.append("## Methods\n\n`--method NAME` or `method=NAME` chooses one; these are its own settings.")
    for name, method in METHODS.items():
        if dataclasses.fields(method):
            values = {name: {"method": plain(method())}}
            parts += [f"### method={name}", _section(method, "method.", values)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(cls: type, above: str, defaults: dict[str, dict[str, Any]], only: set[str] | None = None) -> str:
    """Return a table of a dataclass's own settings, then a section for each nested dataclass."""
    hints, meanings = typing.get_type_hints(cls, include_extras=True), meanings_of(cls)
    rows, below = [], []
    for name in (f.name for f in dataclasses.fields(cls) if only is None or f.name in only):
        kind, key = hints[name], above + name
        if dataclasses.is_dataclass(kind) and kind is not Ramp:
            intro = inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0]
            head = [f"### {key}"]
            if not intro.startswith(("Args:", kind.__name__ + "(")):
                head.append(" ".join(intro.split()))
            below.append("\n\n".join([*head, _section(kind, f"{key}.", defaults)]))
        else:
            meaning = meanings.get(name, "").replace("|", "\\|")  # a bar would end the table's cell
            rows.append(f"| `{key}` | {_takes(kind)} | {_default(key, defaults)} | {meaning} |")
    table = ["| setting | takes | default | meaning |", "|---|---|---|---|", *rows] if rows else []
    return "\n\n".join(part for part in ("\n".join(table), *below) if part)


def _takes(kind: Any) -> str:
    """Return a type and its range in words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        text = f"{_takes(parts[0])}, {parts[1]}".replace("number, a number", "number")
        return re.sub(r"\b\d{8,}\b", lambda number: POWERS.get(int(number[0]), number[0]), text)
    if origin in (typing.Union, types.UnionType):
        kinds = [part for part in parts if part is not type(None) and not (part is float and Ramp in parts)]
        return " or ".join([*map(_takes, kinds), *(["null"] if type(None) in parts else [])])
    if origin is typing.Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin is tuple:
        return f"list of: {_takes(parts[0])}" if parts[-1] is Ellipsis else f"{len(parts)} values: {_takes(parts[0])}"
    if origin is dict:
        return f"by name: {_takes(parts[1])}"
    return WORDS[kind]


def _default(key: str, defaults: dict[str, dict[str, Any]]) -> str:
    """Return the default, or, if the kinds of runs differ, each kind's default."""
    values = {name: _shown(_at(tree, key)) for name, tree in defaults.items()}
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{value} ({name})" for name, value in values.items())


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


def _shown(value: Any) -> str:
    """Return a plain value as a user writes it in a setting."""
    if isinstance(value, dict):
        return ", ".join(f"`{name}`: {_shown(item)}" for name, item in value.items()) or "none"
    if value == "a red mug":
        return "required"
    text = {True: "true", False: "false", None: "null", "": '""'}.get(value) if not isinstance(value, list) else None
    if text is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        text = str(value)
    return f"`{text}`"


if __name__ == "__main__":
    print(reference(), end="")
