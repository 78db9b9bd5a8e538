"""The studio's queue: what is wanted, what is being made, what became of the rest."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Job:
    """One prompt of the queue.

    Args:
        number: 1, 2 ... in the order of their coming.
        prompt: what to make.
        settings: by key, as a layer of the config.
        state: "new" (not looked at yet), "waiting", "running", or "failed".
        message: what is wrong, where it failed.
    """

    number: int
    prompt: str
    settings: Mapping[str, Any]
    state: str = "new"
    message: str = ""


class Queue:
    """Jobs in order; safe from any thread.

    Attributes:
        version: grows with every change, so that who shows the queue knows when to look again.
    """

    def __init__(self):
        self._lock, self._jobs, self._count, self.version = threading.Lock(), dict[int, Job](), 0, 0

    def jobs(self) -> list[Job]:
        """All that are not done, in order."""
        with self._lock:
            return list(self._jobs.values())

    def add(self, prompt: str, settings: Mapping[str, Any]) -> Job:
        """Put a prompt at the end."""
        with self._lock:
            self._count += 1
            return self._put(Job(self._count, prompt, dict(settings)))

    def remove(self, number: int) -> None:
        """Take a job away that has not begun, or has failed; another stays as it is."""
        with self._lock:
            job = self._jobs.get(number)
            if job is not None and job.state != "running":
                self._drop(number)

    def first(self, state: str) -> Job | None:
        """The next job in a state."""
        return next((job for job in self.jobs() if job.state == state), None)

    def move(self, number: int, state: str, message: str = "") -> bool:
        """Bring a job into another state; says whether it was still there."""
        with self._lock:
            if number not in self._jobs:
                return False
            self._put(replace(self._jobs[number], state=state, message=message))
            return True

    def done(self, number: int) -> None:
        """Take away a job that has been made."""
        with self._lock:
            self._drop(number)

    def _put(self, job: Job) -> Job:
        self._jobs[job.number] = job
        self.version += 1
        return job

    def _drop(self, number: int) -> None:
        del self._jobs[number]
        self.version += 1
