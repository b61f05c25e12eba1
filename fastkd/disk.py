"""A disk that is full or fails: known in any library's error, and said in one line with the path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from fastkd.files import DISK_ERRORS, FULL


def failure(error: BaseException | None) -> OSError | None:
    """The system's error of a disk that another one is or comes from; None if it comes from something else.

    Libraries raise errors of their own with the system's text, and what comes from another process has only a text. "Input/output
    error" are words of others too: beside them stands the system's number.
    """
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            return cause
    for text in map(str, causes):
        for number in DISK_ERRORS:
            numbered = number in FULL or any(f"{mark} {number}" in text for mark in ("os error", "Errno"))
            if numbered and os.strerror(number) in text:
                return OSError(number, os.strerror(number))
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from or in the handling of."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@contextmanager
def written(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Within, ``folder`` is written: the error of a full disk that names no path, whichever library raised it, gets this one.

    A disk that fails may have failed in reading, elsewhere: its error is left as it is.

    Raises:
        OSError: a full disk.
    """
    try:
        yield
    except Exception as error:
        found = failure(error)
        names_a_place = isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno is None)
        if found is None or found.errno not in FULL or found.filename is not None or names_a_place:
            raise
        raise OSError(found.errno, found.strerror, str(folder)) from error


def line(error: Exception, found: OSError) -> str:
    """What to say about an error that comes from a disk, as `failure` found it."""
    full = found.errno in FULL
    if found.filename is not None:
        problem = f"{'no room to write' if full else 'the disk failed at'} {found.filename} ({found.strerror})"
    elif error is found:
        problem = f"{'no room on the disk' if full else 'the disk failed'} ({found.strerror})"
    elif full:
        problem = str(error)
    else:  # which may name a remedy of its own: that comes second
        return f"the disk failed: mend it, then the same command goes on from what is saved ({error})"
    return f"{problem}: {'make room' if full else 'mend the disk'}, then the same command goes on from what is saved"
