"""A safe subset of YAML: maps, lists, text, true and false, null, and decimal numbers.

A file may come from a stranger. Tags (they choose Python types), anchors (ten lines of them make 10^9 values), merge
keys and duplicate keys are therefore errors. Values that YAML 1.1 reads as something unexpected (1:30 as 90, 0x10 as
16, 010 as 8, 1_000 as 1000, no as false, 2001-01-01 as a date) are text here, which a setting for numbers refuses.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from sds3d.runtime import files

LARGEST = 2**20  # most bytes of a file; a config has about 2000
DEPTH = 32  # most levels of nested lists and maps
_INT = r"^-?(?:0|[1-9][0-9]{0,40})$"
_FLOAT = r"^[-+]?(?:(?:[0-9]{1,40}\.[0-9]{0,40}|\.[0-9]{1,40})(?:[eE][-+]?[0-9]{1,4})?|[0-9]{1,40}[eE][-+]?[0-9]{1,4})$"


def read(text: str) -> Any:
    """Parse a YAML text. Raises ValueError with the reason on one line."""
    from yaml import YAMLError, load

    try:
        return load(text, Loader=_loader())
    except YAMLError as error:
        raise ValueError(" ".join(str(error).replace(' in "<unicode string>",', " at").split())) from error


def read_file(path: Path) -> Any:
    """Parse a YAML file. Raises ValueError that names the file."""
    try:
        text = files.read_text(path, LARGEST)
    except ValueError as error:
        raise ValueError(f"{error}; give a YAML file with settings") from error
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error


def write(values: Any) -> str:
    """Write values as YAML that `read` reads back unchanged.

    Text is quoted wherever some YAML reader would take it for another type.
    """
    from yaml import dump

    return dump(values, Dumper=_dumper(), sort_keys=False, allow_unicode=True, width=120)


@cache
def _loader() -> type:
    import re

    from yaml import SafeLoader
    from yaml.composer import ComposerError
    from yaml.constructor import ConstructorError

    class Loader(SafeLoader):
        yaml_implicit_resolvers: dict = {}
        yaml_constructors: dict = {}
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event, self.depth = self.peek_event(), self.depth + 1
            if self.depth > DEPTH:
                raise ComposerError(None, None, f"more than {DEPTH} lists and maps in one another", event.start_mark)
            for attribute, name in (("anchor", "an anchor or alias (& or *)"), ("tag", "a tag (!)")):
                if getattr(event, attribute, None) is not None:
                    raise ComposerError(None, None, f"{name} is not read here: write the value out", event.start_mark)
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def build_map(self, node: Any) -> dict:
            mapping: dict = {}
            for key_node, value_node in node.value:
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, dict | list):
                    raise ConstructorError(None, None, "a key is a list or a map", key_node.start_mark)
                if key in mapping:
                    raise ConstructorError(None, None, f"the key {key!r} is there twice", key_node.start_mark)
                mapping[key] = self.construct_object(value_node, deep=True)
            return mapping

    booleans = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
    for name, pattern in (
        ("null", "^(?:~|null|Null|NULL|)$"),
        ("bool", "^(?:" + "|".join(booleans) + ")$"),
        ("int", _INT),
        ("float", _FLOAT),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(pattern), None)
    constructors = {
        "null": lambda loader, node: None,
        "bool": lambda loader, node: booleans[node.value],
        "int": lambda loader, node: int(node.value),
        "float": lambda loader, node: float(node.value),
        "str": lambda loader, node: node.value,
        "seq": lambda loader, node: [loader.construct_object(part, deep=True) for part in node.value],
        "map": Loader.build_map,
    }
    for name, constructor in constructors.items():
        Loader.add_constructor(f"tag:yaml.org,2002:{name}", constructor)
    return Loader


@cache
def _dumper() -> type:
    import re

    from yaml import SafeDumper

    class Dumper(SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        """Quote text that has line breaks which PyYAML would fold."""
        style = '"' if re.search(r"[\x85\u2028\u2029]", value) else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style)

    Dumper.add_representer(str, text)
    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+.0123456789"))
    return Dumper
