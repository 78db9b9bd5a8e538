"""Who looks, from where, and whose picture is rendered next, how large.

Cameras are noted from the browser's threads; pictures are rendered by the thread that trains, between two steps. So
nothing here touches a scene, and asking whether anybody looks costs next to nothing.

While the scene grows, rendering takes at most half of the time for somebody who moves, and a fifth for somebody who
keeps still. When it does not, a moving camera gets small pictures at once, and a sharp one as soon as it rests.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from sds3d.cameras import Poses

MOVING = 0.3  # seconds after its last message in which a camera counts as moving
QUICK, GROWING, SHARP = 0.08, 0.2, 1.0  # seconds a picture may take: while moving, while training, else
SMALLEST, LARGEST = 32, 512  # pixels of height
MODEST = 64  # the height to begin with, while nothing is known of this machine


@dataclass(frozen=True)
class Eye:
    """Somebody who looks.

    Args:
        pose: their camera.
        noted: when it was noted, seconds.
        drawn: when they got their last picture.
        sharp: whether that was a sharp one, from this pose, of a scene that has not changed since.
        seen: whether it was from this pose at all.
    """

    pose: Poses
    noted: float
    drawn: float = -math.inf
    sharp: bool = False
    seen: bool = False


@dataclass(frozen=True)
class Wanted:
    """A picture to render: for whom, from where, how high in pixels, and whether it is as sharp as it gets."""

    key: Hashable
    pose: Poses
    height: int
    sharp: bool


class Eyes:
    """All who look.

    Args:
        clock: seconds, growing.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._lock, self._eyes = clock, threading.Lock(), dict[Hashable, Eye]()
        self._seconds_a_pixel: float | None = None
        self._last = (-math.inf, 0.0)  # when the last picture was finished, and the seconds it took
        self.moved = threading.Event()  # set by every note; who waits for one clears it

    def __len__(self) -> int:
        return len(self._eyes)

    def note(self, key: Hashable, pose: Poses) -> None:
        """Somebody's camera is here now."""
        with self._lock:
            before = self._eyes.get(key)
            self._eyes[key] = Eye(pose, self._clock(), before.drawn if before else -math.inf)
        self.moved.set()

    def forget(self, key: Hashable) -> None:
        """Somebody is gone."""
        with self._lock:
            self._eyes.pop(key, None)

    def blur(self) -> None:
        """Nobody's picture shows the scene as it is now."""
        with self._lock:
            self._eyes = {k: Eye(e.pose, e.noted, e.drawn) for k, e in self._eyes.items()}

    def wanted(self, growing: bool) -> Wanted | None:
        """Whose picture is due; None where nobody's is.

        Args:
            growing: whether training waits meanwhile.
        """
        now = self._clock()
        with self._lock:
            finished, took = self._last
            moved = any(now - e.noted < MOVING for e in self._eyes.values())
            if growing and now < finished + took * (1 if moved else 4):
                return None
            waiting = [(e.seen, e.drawn, k) for k, e in self._eyes.items() if growing or not e.sharp]
            for _, _, key in sorted(waiting, key=lambda w: w[:2]):
                eye = self._eyes[key]
                moving = now - eye.noted < MOVING
                if growing or not eye.seen:
                    seconds = QUICK if moving else GROWING
                elif moving:
                    continue
                else:
                    seconds = SHARP
                return Wanted(key, eye.pose, self._height(seconds, eye.pose.aspect), seconds == SHARP)
        return None

    def drew(self, wanted: Wanted, seconds: float, growing: bool) -> None:
        """A picture was rendered, in so many seconds."""
        now = self._clock()
        cost = seconds / (wanted.height**2 * wanted.pose.aspect)
        self._seconds_a_pixel = cost if self._seconds_a_pixel is None else (self._seconds_a_pixel + cost) / 2
        with self._lock:
            self._last = (now, seconds)
            eye = self._eyes.get(wanted.key)
            if eye is None:
                return
            same = eye.pose is wanted.pose
            self._eyes[wanted.key] = Eye(eye.pose, eye.noted, now, same and wanted.sharp and not growing, same)

    def _height(self, seconds: float, aspect: float) -> int:
        """Pixels of height that are rendered in so many seconds."""
        if self._seconds_a_pixel is None:
            return MODEST
        height = math.sqrt(seconds / (max(self._seconds_a_pixel, 1e-12) * aspect))
        return round(min(max(height, SMALLEST), LARGEST))
