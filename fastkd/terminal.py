"""What a command prints: whole lines at once, without markup; the stages of a long set-up; the name it was called by."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from fastkd import disk

STARTED = time.monotonic()
LOST = re.compile("[\ud800-\udfff]")  # bytes of a file name that are not UTF-8, as Python stores them


def printable(text: str, stream: TextIO) -> str:
    """The text, with a replacement for each character that the stream cannot write."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return LOST.sub("\N{REPLACEMENT CHARACTER}", text).encode(encoding, "replace").decode(encoding)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line at once, never as markup. A closed pipe or terminal does not stop the work."""
    stream = stream or sys.stdout
    with contextlib.suppress(OSError):
        print(printable(text, stream), file=stream, flush=True)


def complain(text: str) -> None:
    """Say on standard error, in one line, what was wrong."""
    say("error: " + " ".join(text.splitlines()), sys.stderr)


def let_go() -> None:
    """Drop the output that could not be written. Python would try it again at its end, and end with a code of its own."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None or stream.closed:
            continue
        try:
            stream.flush()
        except OSError as error:
            if disk.failure(error):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def called(name: str) -> str:
    """The name that this process's command was called by: ``fastkd run``, ``python -m fastkd run`` or ``python -m fastkd.run``."""
    program = Path(sys.argv[0])
    if program.stem == "fastkd":
        return f"fastkd {name}"
    if program == Path(__file__).with_name("__main__.py"):
        return f"python -m fastkd {name}"
    return f"python -m fastkd.{name}"


class Console:
    """Prints to what is standard output at that time. A quiet one, on every rank but 0, prints nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def print(self, text: str = "") -> None:
        """Print a line."""
        if not self.quiet:
            say(text)


class Stages(logging.Handler):
    """Prints what fastkd logs: what a set-up does next, with the seconds since this process began, and warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line; a warning goes to standard error."""
        if record.levelno >= logging.WARNING:
            say(f"warning: {record.getMessage()}", sys.stderr)
        else:
            say(f"{time.monotonic() - STARTED:6.1f} s         {record.getMessage()}")


@contextlib.contextmanager
def stages(quiet: bool = False) -> Iterator[None]:
    """Show stages and warnings while a command works. If quiet, only warnings, as Python does without a handler."""
    log, handler = logging.getLogger("fastkd"), Stages()
    level = log.level
    if not quiet:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@contextlib.contextmanager
def kept_for_answer(active: bool) -> Iterator[TextIO]:
    """Standard output for one answer to a program. While ``active``, all else that is printed goes to standard error."""
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr) if active else contextlib.nullcontext():
        yield out
