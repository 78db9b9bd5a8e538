"""Help on the studio's page: example prompts for a teacher, and the words that it knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sds3d.data.kinds import KINDS, STACKS
from sds3d.data.toybox import SIZES
from sds3d.prompts import COLOURS
from sds3d.teachers.base import HasVocabulary, TeacherConfig
from sds3d.teachers.hf import loading
from sds3d.teachers.load import load_teacher

TITLE = "What it knows"  # heading of the words on the page
TOYS = (
    "a red mug",
    "a blue chair",
    "a yellow duck",
    "a small green boat with a white sail",
    "a red ball on a blue cube",
)


@dataclass(frozen=True)
class Hints:
    """Help for the prompts of a teacher. Both parts may be empty.

    Args:
        examples: prompts that the teacher understands.
        words: group of words -> the words, as a comma-separated text.
    """

    examples: tuple[str, ...] = ()
    words: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, teacher: str) -> Hints:
        """Return the hints of a teacher; none for one that reads any words, or that cannot be loaded."""
        if teacher in ("small", "toybox"):
            return cls(TOYS, _toybox())
        if loading.is_pipeline(teacher):
            return cls()
        try:
            loaded = load_teacher(TeacherConfig(teacher), "cpu")
        except ValueError:  # the queue shows the error if a prompt is sent to this teacher
            return cls()
        words = {"words": ", ".join(sorted(loaded.vocabulary))} if isinstance(loaded, HasVocabulary) else {}
        return cls(loaded.prompts[:3], words)


def without_commands(problem: str) -> str:
    """Adapt the error message of a prompt to the page: replace the advice for the command line."""
    message, separator, _ = problem.partition("; it knows ")
    return f'{message}; see "{TITLE}" above' if separator else problem


def _toybox() -> dict[str, str]:
    """The words of the toybox in groups."""
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
