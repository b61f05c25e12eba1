"""Whose turn the machine is: what is timed waits until nothing else of a suite computes there.

Parts that time nothing hold a shared lock, one for all runs of a user on a machine; parts that time hold it exclusively.
The system lets go of it when a process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def beside_others() -> Iterator[None]:
    """Compute beside whoever does the same; what is timed waits meanwhile."""
    with _file() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def alone(seconds: float) -> Iterator[bool]:
    """Wait for up to ``seconds`` until nobody else computes, and keep others waiting; gives whether it came to that."""
    until = time.monotonic() + seconds
    with _file() as file:
        while not (quiet := _taken(file)) and time.monotonic() < until:
            time.sleep(0.1)
        yield quiet


def is_free() -> bool:
    """Whether nobody else computes now."""
    with _file() as file:
        return _taken(file)


def _file() -> IO[bytes]:
    return (Path(tempfile.gettempdir()) / f"fastkd-device-{os.getuid()}.lock").open("ab")


def _taken(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
