"""Groups of command-line options, as dataclasses whose fields are the options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, field, fields, make_dataclass
from functools import wraps
from typing import Annotated, Any, get_type_hints

from typer import Option

from sds3d.config.meanings import meanings_of


def optional_flags(cls: type) -> Any:
    """Return a dataclass with an optional flag for each field of a dataclass of settings; None means not given.

    The help of a flag is the meaning of the field. Ranges are checked when the settings are built.
    """
    types, meanings = get_type_hints(cls), meanings_of(cls)
    flags = [
        (f.name, Annotated[types[f.name] | None, Option(help=meanings[f.name].rstrip("."))], field(default=None))
        for f in fields(cls)
    ]
    return make_dataclass(f"{cls.__name__}Flags", flags, frozen=True)


def spread(function: Callable) -> Callable:
    """Decorate a command whose last parameter is a dataclass, so that Typer sees the dataclass's fields as options."""
    hints = get_type_hints(function, include_extras=True)
    *own, last = inspect.signature(function).parameters.values()
    cls = hints[last.name]
    options = get_type_hints(cls, include_extras=True)
    parameters = [p.replace(annotation=hints[p.name]) for p in own]
    for f in fields(cls):
        default = inspect.Parameter.empty if f.default is MISSING else f.default
        parameters.append(
            inspect.Parameter(
                f.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=options[f.name]
            )
        )

    @wraps(function)
    def command(**arguments: Any) -> Any:
        values = {f.name: arguments.pop(f.name) for f in fields(cls)}
        return function(**arguments, **{last.name: cls(**values)})

    vars(command)["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command
