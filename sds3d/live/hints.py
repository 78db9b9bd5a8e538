"""What the page tells of a teacher: prompts to begin with, and the words it knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sds3d.data.kinds import KINDS, STACKS
from sds3d.data.toybox import SIZES
from sds3d.prompts import COLOURS
from sds3d.teachers.base import HasVocabulary, TeacherConfig
from sds3d.teachers.hf import loading
from sds3d.teachers.load import load_teacher

TITLE = "What it knows"  # of the folder on the page
TOYS = (
    "a red mug",
    "a blue chair",
    "a yellow duck",
    "a small green boat with a white sail",
    "a red ball on a blue cube",
)


@dataclass(frozen=True)
class Hints:
    """Both may be empty.

    Args:
        examples: prompts it understands.
        words: of each kind, as a list to be read.
    """

    examples: tuple[str, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, teacher: str) -> Hints:
        """Of a teacher by its name; nothing of one that reads any words, or that cannot be loaded."""
        if teacher in ("small", "toybox"):
            return cls(TOYS, _toybox())
        if loading.is_pipeline(teacher):
            return cls()
        try:
            found = load_teacher(TeacherConfig(teacher), "cpu")
        except ValueError:  # the queue says what is wrong, should it be asked for something
            return cls()
        known = {"words": ", ".join(sorted(found.vocabulary))} if isinstance(found, HasVocabulary) else {}
        return cls(found.prompts[:3], known)


def without_commands(problem: str) -> str:
    """What is wrong with a prompt, for somebody who reads a page and not a terminal."""
    told, known, _ = problem.partition("; it knows ")
    return f'{told}; see "{TITLE}" above' if known else problem


def _toybox() -> dict[str, str]:
    """The words of the toybox, by what they are for."""
    stacks = [name.split(" on ") for name in STACKS]
    upper, lower = (" or ".join(dict.fromkeys(names)) for names in zip(*stacks, strict=True))
    return {
        "things": ", ".join(KINDS),
        "one on another": f"a {upper}, on a {lower}",
        "colours": ", ".join(COLOURS),
        "parts, each of a colour": ", ".join(f"{k.second} ({name})" for name, k in KINDS.items() if k.second),
        "sizes": ", ".join(size for size in SIZES if size),
        "backgrounds": 'any colour, as in "on a blue background"',
    }
