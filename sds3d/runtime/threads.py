"""One pool of OpenMP threads for torch and numba, whose threads spin for some milliseconds before they sleep.

A step is thousands of short parallel loops. Threads that sleep after each loop (OMP_WAIT_POLICY=passive) must be woken
for the next one, which takes longer than many of the loops. Threads that never sleep (active) occupy a core that other
programs need. So the threads spin for some milliseconds, which covers the time between two loops, and then sleep.
OpenMP reads this setting once, when its library is loaded, that is when torch is first imported. This module imports
neither torch nor numba.
"""

from __future__ import annotations

import ctypes
import os
import sys

SPINS = 100_000  # one or two milliseconds on an EPYC, four or five on a Xeon, whose pause instruction takes longer
SYSTEM = "libgomp.so.1.0.0"  # the OpenMP library that numba's wheel loads
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def prepare() -> None:
    """Set how OpenMP's threads wait, unless the user has, and load the library that torch and numba can share.

    torch's wheels contain an OpenMP library, and numba looks for the system's. If the system's is loaded first, both
    use it. If torch is already imported, or the system has no such library, torch and numba use one each.
    """
    if not any(name in os.environ for name in SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
    if sys.platform == "linux" and "torch" not in sys.modules:
        try:
            ctypes.CDLL(SYSTEM)
        except OSError:
            pass


def describe() -> str:
    """Return, as text for users, how OpenMP's idle threads wait and which setting decided it."""
    policy, spins = (os.environ.get(name) for name in SETTINGS)
    if spins is None:
        return f"{policy}, by OMP_WAIT_POLICY" if policy else "spin, then sleep: OpenMP's own default"
    by = "sds3d's default: they wake fast and free their cores" if spins == str(SPINS) else "by GOMP_SPINCOUNT"
    return f"spin {spins} times, then sleep ({by})"


def pool() -> str:
    """Return, as text for users, which threads torch and numba use. Call it after torch was imported."""
    loaded = _libraries()
    if any(os.path.basename(path) == SYSTEM for path in loaded) and not any("torch" in path for path in loaded):
        return "one pool for torch and numba"
    if sys.platform != "linux" or not loaded:
        return "torch's and numba's own pools"
    return f"torch's and numba's own pools; to share one, import sds3d before torch on a system with {SYSTEM}"


def _libraries() -> list[str]:
    """Return the paths of GNU's OpenMP libraries that this process has loaded."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            return sorted({line.split(None, 5)[5].strip() for line in maps if "libgomp" in line})
    except OSError:
        return []
