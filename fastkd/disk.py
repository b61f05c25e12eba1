"""A disk that is full or fails: known in any library's error, and said in one line with the path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from fastkd.files import FULL, OF_A_DISK


def failure(error: BaseException | None) -> OSError | None:
    """The system's error of a disk that another one is or comes from; None if it comes from something else.

    Libraries raise errors of their own with the system's text, and what comes from another process has only a text.
    """
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in OF_A_DISK:
            return cause
    texts = [str(cause) for cause in causes]
    numbers = (number for number in OF_A_DISK if any(os.strerror(number) in text for text in texts))
    return next((OSError(number, os.strerror(number)) for number in numbers), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from or in the handling of."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@contextmanager
def written(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Within, ``folder`` is written: the error of a disk that names no path, whichever library raised it, gets this one.

    Raises:
        OSError: a disk that is full or fails.
    """
    try:
        yield
    except Exception as error:
        found = failure(error)
        names_a_place = isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno is None)
        if found is None or found.filename is not None or names_a_place:
            raise
        raise OSError(found.errno, found.strerror, str(folder)) from error


def line(error: Exception, found: OSError) -> str:
    """What to say about an error that comes from a disk, as `failure` found it."""
    is_full = found.errno in FULL
    if found.filename is not None:
        problem = f"{'no room to write' if is_full else 'the disk failed at'} {found.filename} ({found.strerror})"
    elif error is found:
        problem = f"{'no room on the disk' if is_full else 'the disk failed'} ({found.strerror})"
    else:
        problem = str(error)
    return f"{problem}: {'make room' if is_full else 'mend the disk'}, then the same command goes on from what is saved"
