"""A full disk: known in any library's error, and said in one line with the path that could not be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from fastkd.files import FULL


def full(error: BaseException | None) -> OSError | None:
    """The system's error of a full disk that another one is or comes from; None if it comes from something else.

    Libraries raise errors of their own with the system's text, and what comes from another process has only a text.
    """
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in FULL:
            return cause
    texts = [str(cause) for cause in causes]
    numbers = (number for number in FULL if any(os.strerror(number) in text for text in texts))
    return next((OSError(number, os.strerror(number)) for number in numbers), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from or in the handling of."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@contextmanager
def written(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Within, ``folder`` is written: the error of a full disk that names no path, whichever library raised it, gets this one.

    Raises:
        OSError: a full disk.
    """
    try:
        yield
    except Exception as error:
        found = full(error)
        names_a_place = isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno is None)
        if found is None or found.filename is not None or names_a_place:
            raise
        raise OSError(found.errno, found.strerror, str(folder)) from error


def line(error: Exception, found: OSError) -> str:
    """What to say about an error that comes from a full disk, as `full` found it."""
    if found.filename is None:
        problem = f"no room on the disk ({found.strerror})" if error is found else str(error)
    else:
        problem = f"no room to write {found.filename} ({found.strerror})"
    return f"{problem}: make room, then the same command goes on from what is saved"
