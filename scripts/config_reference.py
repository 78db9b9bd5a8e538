"""Generate the configuration reference, in Markdown, from the dataclasses of sds3d/config/schema.py and the methods.

    python scripts/config_reference.py > settings.md

At every build of the site it replaces ``<!-- settings -->`` in docs/configuration.md (scripts/docs_site.py).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import typing
from typing import Any

from sds3d.config.load import default_method
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
            head = [f"### {key}"] + ([] if intro.startswith(("Args:", kind.__name__ + "(")) else [_one_line(intro)])
            below.append("\n\n".join([*head, _section(kind, f"{key}.", defaults)]))
        else:
            rows.append(f"| `{key}` | {_takes(kind)} | {_default(key, defaults)} | {meanings.get(name, '')} |")
    table = ["| setting | takes | default | meaning |", "|---|---|---|---|", *rows] if rows else []
    return "\n\n".join(part for part in ("\n".join(table), *below) if part)


def meanings_of(cls: type) -> dict[str, str]:
    """Return the meaning of each field.

    The meaning is the field's entry in the docstring's Args, or the comment beside or above the field. For a weight
    ``lambda_<name>`` it is the first line of the docstring of the function <name> in the same module.
    """
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        meanings |= _comments(inspect.getsource(base))
        meanings |= _arguments(inspect.cleandoc(base.__doc__ or ""))
    for name in (f.name for f in dataclasses.fields(cls)):
        function = getattr(sys.modules[cls.__module__], name.removeprefix("lambda_"), None)
        if name not in meanings and name.startswith("lambda_") and function is not None:
            text = inspect.cleandoc(function.__doc__ or "").split("\n")[0].removeprefix("Return ")
            meanings[name] = f"weight of {text}"
    return {name: _one_line(text) for name, text in meanings.items()}


def _arguments(docstring: str) -> dict[str, str]:
    """Return the Args section of a docstring, by name; names on the same line have the same text."""
    section = re.search(r"^Args:\n(.*?)(?:\n\S|\Z)", docstring, re.S | re.M)
    texts: dict[str, str] = {}
    for names, text in re.findall(r"^    (\w[\w, ]*): (.*?)(?=^    \w|\Z)", section[1] if section else "", re.S | re.M):
        texts |= dict.fromkeys(names.split(", "), text)
    return texts


def _comments(source: str) -> dict[str, str]:
    """Return the comments beside the fields of a class's source, or in the lines above them."""
    texts: dict[str, str] = {}
    above: list[str] = []
    for line in map(str.strip, source.splitlines()):
        field = re.match(r"(\w+): [^#]*?(?:#\s*(.*))?$", line)
        if field and (field[2] or above):
            texts[field[1]] = field[2] or " ".join(above)
        above = [*above, line.lstrip("# ")] if line.startswith("#") else []
    return texts


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


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
