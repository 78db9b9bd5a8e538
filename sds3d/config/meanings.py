"""Reads the meanings of settings from the docstrings of their dataclasses, for --help and the documentation."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys


def meanings_of(cls: type) -> dict[str, str]:
    """Return the meaning of each field.

    The meaning is the field's entry in the docstring's Args, or the comment beside or above the field. For a weight
    ``lambda_<name>`` it is the first line of the docstring of the function <name> in the same module.
    """
    meanings: dict[str, str] = {}
    for base in (base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)):
        arguments = _arguments(inspect.cleandoc(base.__doc__ or ""))
        if not arguments.keys() >= base.__annotations__.keys():
            meanings |= _comments(inspect.getsource(base))
        meanings |= arguments
    for name in (f.name for f in dataclasses.fields(cls)):
        function = getattr(sys.modules[cls.__module__], name.removeprefix("lambda_"), None)
        if name not in meanings and name.startswith("lambda_") and function is not None:
            text = inspect.cleandoc(function.__doc__ or "").split("\n")[0].removeprefix("Return ")
            meanings[name] = f"weight of {text}"
    return {name: " ".join(text.split()) for name, text in meanings.items()}


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
