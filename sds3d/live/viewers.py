"""The viewers of a page: their cameras, and which of them gets the next picture, of what size.

Cameras are updated from the browser's threads. Pictures are rendered by the thread that trains, between two steps.
Nothing here touches a scene, and asking whether there are viewers costs almost nothing.

During training, rendering takes at most half of the time while a camera moves, and a fifth while all rest. Otherwise a
moving camera gets small pictures at once, and a sharp one as soon as it rests.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from sds3d.cameras import Poses

MOVING = 0.3  # seconds after its last update in which a camera counts as moving
QUICK, GROWING, SHARP = 0.08, 0.2, 1.0  # seconds that a picture may take: while moving, while training, else
SMALLEST, LARGEST = 32, 512  # height of a picture in pixels
INITIAL = 64  # height of the first picture, before this machine's speed is known


@dataclass(frozen=True)
class Viewer:
    """A viewer of the page.

    Args:
        pose: the viewer's camera.
        updated: time of the camera's last update, seconds.
        drawn: time of the viewer's last picture.
        sharp: whether that picture was a sharp one, from this pose, of a scene that has not changed since.
        current: whether that picture was from this pose.
    """

    pose: Poses
    updated: float
    drawn: float = -math.inf
    sharp: bool = False
    current: bool = False


@dataclass(frozen=True)
class Request:
    """A picture to render: the viewer's key, the camera, the height in pixels, and whether it is the sharpest."""

    key: Hashable
    pose: Poses
    height: int
    sharp: bool


class Viewers:
    """All viewers of the page.

    Args:
        clock: returns the time in seconds, never decreasing.

    Attributes:
        changed: set by every update; whoever waits for it clears it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._lock, self._viewers = clock, threading.Lock(), dict[Hashable, Viewer]()
        self._seconds_per_pixel: float | None = None
        self._last = (-math.inf, 0.0)  # time at which the last picture was finished, and the seconds it took
        self.changed = threading.Event()

    def __len__(self) -> int:
        return len(self._viewers)

    def update(self, key: Hashable, pose: Poses) -> None:
        """Add a viewer, or set the viewer's camera."""
        with self._lock:
            before = self._viewers.get(key)
            self._viewers[key] = Viewer(pose, self._clock(), before.drawn if before else -math.inf)
        self.changed.set()

    def remove(self, key: Hashable) -> None:
        """Remove a viewer."""
        with self._lock:
            self._viewers.pop(key, None)

    def invalidate(self) -> None:
        """Mark all pictures as outdated, since the scene has changed."""
        with self._lock:
            self._viewers = {k: Viewer(v.pose, v.updated, v.drawn) for k, v in self._viewers.items()}

    def next_request(self, training: bool) -> Request | None:
        """Return the next picture to render; None if none is due.

        Args:
            training: whether a training waits meanwhile.
        """
        now = self._clock()
        with self._lock:
            finished, took = self._last
            moved = any(now - v.updated < MOVING for v in self._viewers.values())
            if training and now < finished + took * (1 if moved else 4):
                return None
            waiting = [(v.current, v.drawn, k) for k, v in self._viewers.items() if training or not v.sharp]
            for _, _, key in sorted(waiting, key=lambda entry: entry[:2]):
                viewer = self._viewers[key]
                moving = now - viewer.updated < MOVING
                if training or not viewer.current:
                    seconds = QUICK if moving else GROWING
                elif moving:
                    continue
                else:
                    seconds = SHARP
                return Request(key, viewer.pose, self._height(seconds, viewer.pose.aspect), seconds == SHARP)
        return None

    def record(self, request: Request, seconds: float, training: bool) -> None:
        """Record that a picture was rendered, and how many seconds it took."""
        now = self._clock()
        cost = seconds / (request.height**2 * request.pose.aspect)
        self._seconds_per_pixel = cost if self._seconds_per_pixel is None else (self._seconds_per_pixel + cost) / 2
        with self._lock:
            self._last = (now, seconds)
            viewer = self._viewers.get(request.key)
            if viewer is None:
                return
            same = viewer.pose is request.pose
            sharp = same and request.sharp and not training
            self._viewers[request.key] = Viewer(viewer.pose, viewer.updated, now, sharp, same)

    def _height(self, seconds: float, aspect: float) -> int:
        """Height in pixels of a picture that takes this many seconds."""
        if self._seconds_per_pixel is None:
            return INITIAL
        height = math.sqrt(seconds / (max(self._seconds_per_pixel, 1e-12) * aspect))
        return round(min(max(height, SMALLEST), LARGEST))
