"""The torch modes that training needs, whatever the calling program has set: gradients on, inference mode and autocast
off. A web server or a node editor often calls from inside ``torch.inference_mode()``."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

T = TypeVar("T")
P = ParamSpec("P")
_computing: list[int] = []  # the process that loaded or computed first


def require_own_process() -> None:
    """Raise ValueError in a process that was forked from one that has computed.

    The forked process lacks the kernels' threads, so that a kernel would hang, or OpenMP would end the process. Every
    function that computes calls this first, and so does every function that loads a network or a scene, since torch
    uses the same threads to fill and convert large weights.
    """
    if not _computing:
        _computing.append(os.getpid())
    elif _computing[0] != os.getpid():
        raise ValueError(
            "this process was forked from one in which sds3d had loaded or computed something, and its threads do not "
            'survive a fork: start processes with multiprocessing.get_context("spawn"), or use sds3d in the child only'
        )


@contextmanager
def training() -> Iterator[None]:
    """Record gradients inside the block, and restore the caller's modes afterwards. Also works as a decorator.

    Raises:
        ValueError: see `require_own_process`.
    """
    require_own_process()
    cpu, cuda = (torch.autocast(device, enabled=False) for device in ("cpu", "cuda"))
    with torch.inference_mode(False), torch.enable_grad(), cpu, cuda:
        yield


def stepwise_training(function: Callable[P, Generator[T]]) -> Callable[P, Generator[T]]:
    """Decorate a generator so that each of its steps runs in ``training``; between steps the caller's modes hold."""

    @wraps(function)
    def steps_of(*arguments: P.args, **named: P.kwargs) -> Generator[T]:
        steps = function(*arguments, **named)
        try:
            while True:
                with training():
                    step = next(steps, None)
                if step is None:
                    return
                yield step
        finally:
            with training():
                steps.close()

    return steps_of
