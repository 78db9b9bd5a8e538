"""One pool of OpenMP threads for torch and numba, whose threads spin for a moment before they sleep.

A step is thousands of short parallel loops. Threads that sleep after each (OMP_WAIT_POLICY=passive) must be woken for
the next, which takes longer than many of the loops. Threads that never sleep (active) keep a core busy while there is
nothing to do, and take it from whoever needs it. So they spin for some milliseconds, which covers the time between two
loops, and then sleep. OpenMP reads this once, when its library is loaded: when torch is first imported. This module
imports neither torch nor numba.
"""

from __future__ import annotations

import ctypes
import os
import sys

SPINS = 100_000  # a millisecond or two on an EPYC, four or five on a Xeon, whose pause takes longer
SYSTEM = "libgomp.so.1.0.0"  # the name by which numba's wheel asks for OpenMP
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def prepare() -> None:
    """Set how OpenMP's threads wait, where the user has not, and load the library that torch and numba can share.

    torch's wheels carry an OpenMP library of their own, and numba looks for the system's. Loaded first, the system's
    serves both. Where torch is already there, or the system has none, each keeps its own.
    """
    if not any(name in os.environ for name in SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    if sys.platform == "linux" and "torch" not in sys.modules:
        try:
            ctypes.CDLL(SYSTEM)
        except OSError:
            pass


def describe() -> str:
    """How OpenMP's waiting threads wait, and who decided that, for people."""
    policy, spins = (os.environ.get(name) for name in SETTINGS)
    if spins is None:
        return f"{policy}, by OMP_WAIT_POLICY" if policy else "spin, then sleep: OpenMP's own default"
    by = "sds3d's default: quick to go on, and no core is kept" if spins == str(SPINS) else "by GOMP_SPINCOUNT"
    return f"spin {spins} times, then sleep ({by})"


def pool() -> str:
    """Whose threads torch and numba use, for people; torch must have been imported."""
    loaded = _libraries()
    if any(os.path.basename(path) == SYSTEM for path in loaded) and not any("torch" in path for path in loaded):
        return "one pool for torch and numba"
    if sys.platform != "linux" or not loaded:
        return "torch's and numba's own pools"
    return f"torch's and numba's own pools; import sds3d before torch, where the system has {SYSTEM}, to share one"


def _libraries() -> list[str]:
    """GNU's OpenMP libraries that this process has loaded."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            return sorted({line.split(None, 5)[5].strip() for line in maps if "libgomp" in line})
    except OSError:
        return []
