"""Runs trainings in forks of this process, which end in the middle."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sparkmim.errors import UserError
from sparkmim.runs.history import History

REFUSED = 2
"""Exit status of a fork that ends by a `UserError`."""


def forked(train: Callable[[], Any]) -> int:
    """Starts a training in a fork; returns the number of the process."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        train()
        status = 0
    except UserError:
        status = REFUSED
    finally:
        os._exit(status)


def status_of(child: int) -> int:
    """Waits for a fork; returns its exit status, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def before_each_write(act: Callable[[int], None]) -> Iterator[None]:
    """Calls `act` with 1, 2, … before files are put in their places, and events into the history."""
    count = itertools.count(1)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            act(next(count))
            return function(*args, **kwargs)

        return write

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", counted(Path.replace))
        patch.setattr(History, "add", counted(History.add))
        yield


def killed_at(write: int, train: Callable[[], Any]) -> bool:
    """Runs a training in a fork that is killed before one of its writes; tells whether it came so far."""

    def act(number: int) -> None:
        if number == write:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        with before_each_write(act):
            train()

    return status_of(forked(run)) == -signal.SIGKILL


def killed_after(seconds: float, train: Callable[[], Any]) -> bool:
    """Runs a training in a fork that the system kills after some time; tells whether it was still running."""

    def run() -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # nobody handles its signal
        train()

    return status_of(forked(run)) == -signal.SIGALRM
