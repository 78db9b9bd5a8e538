"""The studio's queue of prompts: those that wait, the one in training, and those that failed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Job:
    """One prompt of the queue.

    Args:
        number: 1, 2 ... in the order in which they were added.
        prompt: what to make.
        settings: dotted key -> value, a layer of the config.
        state: "new" (not checked yet), "waiting", "running", or "failed".
        message: the error of a failed job.
    """

    number: int
    prompt: str
    settings: Mapping[str, Any]
    state: str = "new"
    message: str = ""


class Queue:
    """Jobs in order. Its methods may be called from any thread.

    Attributes:
        version: grows with every change, so that a display knows when it is outdated.
    """

    def __init__(self):
        self._lock, self._jobs, self._count, self.version = threading.Lock(), dict[int, Job](), 0, 0

    def jobs(self) -> list[Job]:
        """Return all jobs that are not done, in order."""
        with self._lock:
            return list(self._jobs.values())

    def add(self, prompt: str, settings: Mapping[str, Any]) -> Job:
        """Add a prompt at the end."""
        with self._lock:
            self._count += 1
            return self._put(Job(self._count, prompt, dict(settings)))

    def remove(self, number: int) -> None:
        """Remove a job unless it is running."""
        with self._lock:
            job = self._jobs.get(number)
            if job is not None and job.state != "running":
                self._drop(number)

    def first(self, state: str) -> Job | None:
        """Return the first job in a state; None if there is none."""
        return next((job for job in self.jobs() if job.state == state), None)

    def move(self, number: int, state: str, message: str = "") -> bool:
        """Set the state of a job. Returns False if the job was removed meanwhile."""
        with self._lock:
            if number not in self._jobs:
                return False
            self._put(replace(self._jobs[number], state=state, message=message))
            return True

    def done(self, number: int) -> None:
        """Remove a job that is done."""
        with self._lock:
            self._drop(number)

    def _put(self, job: Job) -> Job:
        self._jobs[job.number] = job
        self.version += 1
        return job

    def _drop(self, number: int) -> None:
        del self._jobs[number]
        self.version += 1
