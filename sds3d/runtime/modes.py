"""The modes of torch that training needs, whatever the program that calls has set: gradients, no inference mode and no
autocast. A web server or a graph of nodes often calls from inside ``torch.inference_mode()``."""

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
    """Raises ValueError in a process forked from one that has computed: the threads of its kernels are not there, and
    the first that waits for them waits for ever, or is ended by OpenMP.

    Whatever computes calls it first, and so does whatever loads a network or a scene: to fill and convert large weights
    torch starts the same threads.
    """
    if not _computing:
        _computing.append(os.getpid())
    elif _computing[0] != os.getpid():
        raise ValueError(
            "this process was forked from one in which sds3d had loaded or computed something, and the threads that "
            'work for it do not survive that: start processes with multiprocessing.get_context("spawn"), or use sds3d '
            "in the child only"
        )


@contextmanager
def training() -> Iterator[None]:
    """Inside, gradients are recorded and new tensors can take part in them; afterwards the modes are the caller's. Also
    a decorator of functions.

    Raises:
        ValueError: see `require_own_process`.
    """
    require_own_process()
    cpu, cuda = (torch.autocast(device, enabled=False) for device in ("cpu", "cuda"))
    with torch.inference_mode(False), torch.enable_grad(), cpu, cuda:
        yield


def stepwise_training(function: Callable[P, Generator[T]]) -> Callable[P, Generator[T]]:
    """Decorate a generator: each of its steps is made in ``training``; between two the modes are the caller's."""

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
