"""Signals that ask a command to stop (Ctrl-C, SIGTERM, a closed terminal): one line and exit code 75, in every phase.

All files are written whole or not at all. So a command ends at once, wherever it is, unless it is in work that stops better:
`deferred`, which saves first, or `raised`, which tidies up. A second Ctrl-C ends it at once there too. A second signal of
another kind does not stop a save: launchers and schedulers send several (LSF a SIGINT and, 10 s later, a SIGTERM; torchrun
passes on what the group has got already), and set an end with SIGKILL. A thread looks for signals: the main thread sees one
only after a call into a library, and a rank may wait in such a call for hours.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

EXIT_INTERRUPTED = 75
INTERRUPTED = "interrupted: what was saved is kept, and the same command continues from there"
ASKING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
ECHO_S = 0.5  # `timeout` and launchers signal a process and its group: within this time it is the same request
TIDY_S = 10.0  # for a KeyboardInterrupt to end the work; a library may have swallowed it
SHOW_CURSOR = b"\x1b[?25h\n"  # a progress bar hides it

AT_ONCE, DEFERRED, RAISED = "at once", "deferred", "raised"
_stop = AT_ONCE  # what the first signal does
_asked_at: float | None = None
_interrupted_at: float | None = None  # the first Ctrl-C
_was_raised = _watching = False
_ending = threading.Lock()


def asked() -> bool:
    """Whether a signal has asked this command to stop."""
    return _asked_at is not None


@contextmanager
def watched() -> Iterator[None]:
    """Within, a signal ends the process as this module says. A signal that the process ignores (``nohup``) stays ignored.

    Inside another of these, or off the main thread, it changes nothing.
    """
    global _watching
    if _watching or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    _watching = True
    _begin()
    before = {s: handler for s in ASKING if (handler := signal.getsignal(s)) is not signal.SIG_IGN}
    thread = threading.Thread(target=_watch, args=(reader, frozenset(before)), daemon=True, name="signals")
    thread.start()
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for number in before:
        signal.signal(number, _handle)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        writer.shutdown(socket.SHUT_WR)  # a fork may hold it open
        thread.join()
        writer.close()
        reader.close()
        _watching = False
        _begin()
        atexit.unregister(_ignore)
        atexit.register(_ignore)  # the work is done: a signal that comes while Python ends changes nothing
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Within, a signal only makes `asked` true; the work then saves and ends itself. A second Ctrl-C ends it at once.

    Raises:
        KeyboardInterrupt: at the end, if it was asked to stop and did not.
    """
    with _stopped(DEFERRED):
        yield


@contextmanager
def raised() -> Iterator[None]:
    """Within, the first signal raises KeyboardInterrupt in the main thread."""
    hook = sys.unraisablehook
    with _stopped(RAISED):
        sys.unraisablehook = lambda seen: _lost(seen, hook)
        try:
            yield
        finally:
            sys.unraisablehook = hook


@contextmanager
def withheld() -> Iterator[None]:
    """Within, a process that this thread starts has these signals blocked: they do not end it before it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _stopped(how: str) -> Iterator[None]:
    global _stop
    with watched():
        before, _stop = _stop, how
        try:
            yield
        finally:
            _stop = before
        if asked():
            raise KeyboardInterrupt


def _begin() -> None:
    global _stop, _asked_at, _interrupted_at, _was_raised
    _stop, _asked_at, _interrupted_at, _was_raised = AT_ONCE, None, None, False


def _lost(seen: Any, hook: Callable[[Any], object]) -> None:
    """A KeyboardInterrupt that was raised where Python cannot pass it on, such as a finaliser, ends the process."""
    if asked() and issubclass(seen.exc_type, KeyboardInterrupt):
        _end()
    hook(seen)


def _handle(number: int, frame: FrameType | None) -> None:
    """In the main thread, once it is back in Python. `_watch` does all else, and may have done it long before."""
    global _asked_at, _was_raised
    if _asked_at is None:
        _asked_at = time.monotonic()
    if _stop == RAISED and not _was_raised:
        _was_raised = True
        raise KeyboardInterrupt


def _watch(reader: socket.socket, numbers: frozenset[int]) -> None:
    """In a thread of its own: the system writes the number of each signal to ``reader``'s other end at once."""
    while True:
        reader.settimeout(TIDY_S if asked() and _stop == RAISED else None)
        try:
            came = reader.recv(64)
        except TimeoutError:
            _end()
        if not came:
            return
        for number in came:
            if number in numbers:
                _take(number)


def _take(number: int) -> None:
    global _asked_at, _interrupted_at
    now = time.monotonic()
    if _asked_at is None:
        _asked_at = now
    if number == signal.SIGINT and _interrupted_at is None:
        _interrupted_at = now
    raised_already = _was_raised and now - _asked_at <= ECHO_S  # the main thread was faster, and has left `raised`
    if _stop == AT_ONCE and not raised_already:
        _end()
    first = _asked_at if _stop == RAISED else _interrupted_at if number == signal.SIGINT else None
    if first is not None and now - first > ECHO_S:
        _end()


def _end() -> NoReturn:
    """End this process. Its children see their pipes close and end too."""
    if not _ending.acquire(blocking=False):
        threading.Event().wait()  # another thread is at it
    with suppress(OSError):
        if os.isatty(1):
            os.write(1, SHOW_CURSOR)
    with suppress(OSError):
        if os.environ.get("RANK", "0") == "0":
            os.write(2, INTERRUPTED.encode() + b"\n")
    os._exit(EXIT_INTERRUPTED)


def _ignore() -> None:
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)


def _after_fork() -> None:
    """A fork shares the pipe: what it is sent is not for the process that it came from."""
    global _watching
    if _watching:
        _watching = False
        signal.set_wakeup_fd(-1)
        for number in ASKING:
            if signal.getsignal(number) is _handle:
                signal.signal(number, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
