"""What settings mean, as the docstrings of their dataclasses say it: for --help and for the documentation."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys


def meanings_of(cls: type) -> dict[str, str]:
    """What each field means: the Args of the docstrings, the comment beside a field or above it, or, of a weight
    ``lambda_<name>``, the first line of the function of that name beside the class."""
    found: dict[str, str] = {}
    for base in (base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)):
        arguments = _arguments(inspect.cleandoc(base.__doc__ or ""))
        if not arguments.keys() >= base.__annotations__.keys():
            found |= _comments(inspect.getsource(base))
        found |= arguments
    for name in (f.name for f in dataclasses.fields(cls)):
        function = getattr(sys.modules[cls.__module__], name.removeprefix("lambda_"), None)
        if name not in found and name.startswith("lambda_") and function is not None:
            found[name] = "weight of: " + inspect.cleandoc(function.__doc__ or "").split("\n")[0]
    return {name: " ".join(text.split()) for name, text in found.items()}


def _arguments(docstring: str) -> dict[str, str]:
    """The Args section of a docstring, by name; names that share a line share its text."""
    section = re.search(r"^Args:\n(.*?)(?:\n\S|\Z)", docstring, re.S | re.M)
    found: dict[str, str] = {}
    for names, text in re.findall(r"^    (\w[\w, ]*): (.*?)(?=^    \w|\Z)", section[1] if section else "", re.S | re.M):
        found |= dict.fromkeys(names.split(", "), text)
    return found


def _comments(source: str) -> dict[str, str]:
    """Comments beside fields, or in the lines above them."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in map(str.strip, source.splitlines()):
        field = re.match(r"(\w+): [^#]*?(?:#\s*(.*))?$", line)
        if field and (field[2] or above):
            found[field[1]] = field[2] or " ".join(above)
        above = [*above, line.lstrip("# ")] if line.startswith("#") else []
    return found
