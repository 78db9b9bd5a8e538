"""Errors that several packages raise, and where warnings point."""

import sys


class Diverged(RuntimeError):
    """Raised if a loss, a gradient or a weight is not finite. The last checkpoint is finite and stays."""


def stacklevel() -> int:
    """Return the ``stacklevel`` with which `warnings.warn`, called next, names the line that called the package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "sds3d":
        level, frame = level + 1, frame.f_back
    return level
