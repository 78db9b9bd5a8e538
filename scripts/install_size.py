"""Print what each dependency of the base costs: megabytes on the disk, and seconds to import.

    python scripts/install_size.py

A package's megabytes are those of its own files. "Only for it" adds the packages that nothing else of the base needs, and
is what leaving it out would save. Seconds are CPU seconds of the import in a new process, less those of Python itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
MODULES = {"pyyaml": "yaml", "pillow": "PIL.Image", "scikit-image": "skimage.measure", "scipy": "scipy.ndimage"} | {
    "matplotlib": "matplotlib.figure",
    "fast-simplification": "fast_simplification",
}


def megabytes(name: str) -> float:
    """Return the size of a distribution's files."""
    distribution = metadata.distribution(name)
    paths = [distribution.locate_file(file) for file in distribution.files or []]
    return sum(os.path.getsize(str(path)) for path in paths if os.path.exists(str(path))) / 1e6


def needed(requirements: Iterable[Requirement]) -> set[str]:
    """Return the names of all installed distributions that some requirements lead to."""
    names: set[str] = set()
    todo = [(r.name.lower(), tuple(r.extras)) for r in requirements]
    while todo:
        name, extras = todo.pop()
        if name in names:
            continue
        try:
            below = map(Requirement, metadata.requires(name) or [])
        except metadata.PackageNotFoundError:  # of another platform
            continue
        names.add(name)
        for r in below:
            if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                todo.append((r.name.lower().replace("_", "-"), tuple(r.extras)))
    return names


def import_seconds(module: str) -> float:
    """Return the CPU seconds that a new process takes to import a module; nothing for an empty name."""
    before = os.times()
    subprocess.run([sys.executable, "-c", f"import {module}" if module else ""], check=True, stderr=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = [Requirement(text) for text in project["dependencies"]]
    whole = needed(base)
    print("| package | MB | only for it, MB | import, s |\n|---|---:|---:|---:|")
    idle = import_seconds("")
    for r in base:
        own = whole - needed(other for other in base if other is not r)
        seconds = import_seconds(MODULES.get(r.name, r.name)) - idle
        print(f"| {r.name} | {megabytes(r.name):.1f} | {sum(map(megabytes, own)):.1f} | {max(seconds, 0):.1f} |")
    print(f"| all {len(whole)} packages | {sum(map(megabytes, whole)):.0f} | | |")


if __name__ == "__main__":
    main()
