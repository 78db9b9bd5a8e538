"""What the documentation shows, taken out of its pages: blocks of code, commands, and the same made short."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conftest import TINY

ROOT = Path(__file__).parents[1]
PAGES = sorted(p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("sds3d/teachers/*.md")))
MARKS = ("slow", "gpu", "cluster", "exit 0 or 1")  # <!-- test: slow --> above a block

# A scene, an image, a generator of a second or two. A command keeps its own settings, but for these.
SMALLER = (
    "steps=2 render.fine_samples=16 export.mesh.resolution=16 export.mesh.texture=64 export.frames=2 export.size=16 "
    "log.save_every=100 log.picture_every=50"
)
SCENE = [f"{key}={value}" for key, value in dict(s.split("=") for s in (*TINY, *SMALLER.split())).items()]
IMAGES = "steps=2 image.size=16".split()
GENERATOR = "steps=2 generator.batch=4 pairs.count=4 pairs.batch=2 pairs.steps=2".split()
SHORT: dict[str, tuple[list[str], dict[str, str]]] = {  # command -> settings, and flags with their values
    "generate": (SCENE, {}),
    "resume": (["steps=4"], {}),
    "paint": (IMAGES, {"-n": "2"}),
    "compare": ([*IMAGES, "image.count=1"], {}),
    "distill": (GENERATOR, {}),
    "sample": ([], {"-n": "2"}),
    "eval": ([], {}),
    "export": ([], {"--resolution": "24", "--texture": "128"}),
    "render": ([], {"--size": "16", "--frames": "2"}),
    "teacher sample": ([], {"-n": "2", "--steps": "2"}),
    "teacher train": ("steps=2 batch=2".split(), {}),
}
SERVES = ("studio", "view", "--live")  # until Ctrl-C


@dataclass(frozen=True)
class Block:
    """A fenced block of a page; ``line`` is that of its fence."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page. Raises ValueError for a mark that is none."""
    lines, mark, number = page.read_text(encoding="utf-8").splitlines(), "", 0
    while number < len(lines):
        line = lines[number]
        if line.startswith("```"):
            end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == "```")
            yield Block(page, number + 1, line[3:].strip(), mark, "\n".join(lines[number + 1 : end]))
            number, mark = end, ""
        elif found := re.fullmatch(r"<!-- test: (.*) -->", line):
            mark = found[1]
            if mark not in MARKS:
                raise ValueError(f"{page}:{number + 1}: the mark is {mark!r}; give {', '.join(MARKS)}")
        elif line.strip():
            mark = ""
        number += 1


def commands(block: Block) -> list[list[str]]:
    """The commands of a block, as arguments, without comments; a line with && is two, two with a backslash are one."""
    found = [shlex.split(line, comments=True) for line in block.text.replace("\\\n", " ").splitlines()]
    parts: list[list[str]] = []
    for arguments in filter(None, found):
        parts.append([])
        for argument in arguments:
            if argument == "&&":
                parts.append([])
            else:
                parts[-1].append(argument)
    return parts


def shortened(arguments: list[str]) -> list[str]:
    """The arguments of sds3d for the same in a second: its own settings, but for those that cost time."""
    name = " ".join(arguments[:2]) if arguments[0] == "teacher" else arguments[0]
    settings, flags = SHORT.get(name, ([], {}))
    if name == "resume" and not any(a.startswith("steps=") for a in arguments):
        settings = []
    if name == "eval" and any("digits" in a or "toybox" in a for a in arguments):
        flags = {"-n": "24", "--seeds": "1"}
    if name == "compare" and "scene" in arguments:
        settings = SCENE
    if name == "export" and not {"glb", "obj", "ply", "stl"} & set(" ".join(arguments).replace(",", " ").split()):
        flags = {"--resolution": "24"}
    kept, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in flags:
            rest.pop(0)
        elif "=" not in argument or argument.split("=")[0] not in {s.split("=")[0] for s in settings}:
            kept.append(argument)
    return [*kept, *settings, *(part for flag in flags.items() for part in flag)]


class Shortened(ast.NodeTransformer):
    """Python in which runs that sds3d makes are short ones."""

    RUNS = {"generate": SCENE, "paint": IMAGES, "train_generator": GENERATOR}

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name in self.RUNS and isinstance(node.func.value, ast.Name) and node.func.value.id == "sds3d":
            pairs = dict(setting.split("=") for setting in self.RUNS[name])
            values = ast.parse(repr({k: int(v) if v.isdigit() else v for k, v in pairs.items()}), mode="eval").body
            node.keywords = [k for k in node.keywords if k.arg not in pairs] + [ast.keyword(None, values)]
        return node


def python(text: str, place: str):
    """A block of Python, compiled, its runs short."""
    return compile(ast.fix_missing_locations(Shortened().visit(ast.parse(text))), place, "exec")


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as the site and repository viewers make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", h.replace("`", "")).strip().lower()) for h in headings}
