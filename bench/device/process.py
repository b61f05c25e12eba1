"""A command in a process of its own, which ends with all its children at its limit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GRACE = 5.0  # seconds from the request to end to the kill


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int | None  # its exit status; None where it was cut off
    seconds: float
    line: str  # the last that it said


def run(argv: Sequence[str], *, environment: Mapping[str, str], log: Path, seconds: float) -> Ended:
    """Run a command for at most ``seconds`` seconds, its two outputs appended to ``log``.

    It leads a session of its own. At the limit, and where this is interrupted, the whole session is asked to end
    (SIGTERM) and, `GRACE` seconds later, killed; what the command leaves behind when it ends by itself is killed too.
    """
    started, code = time.monotonic(), None
    with log.open("ab") as file:
        process = subprocess.Popen(
            argv, env=dict(environment), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=max(seconds, 0.0))
            line = last_line(log)  # before it says where it was interrupted
        finally:
            _end(process)
    return Ended(code, time.monotonic() - started, line)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End every process of the session."""
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)
    until = time.monotonic() + GRACE
    while _signal(process, signal.SIGKILL) and time.monotonic() < until:
        process.poll()
        time.sleep(0.01)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> bool:
    """Whether there is anybody left to signal."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def last_line(log: Path) -> str:
    """The last line of a log that is not blank, "" where there is none."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65536))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
