"""A process of a part's own: its rows arrive one by one, and however it ends, those that arrived stay.

A worker is a module whose ``main`` prints a row as one line of JSON as soon as it has it; other lines are noise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from bench.device.part import Row

ROOT = Path(__file__).parents[2]
LONGEST_REASON = 300  # characters
READY: Row = {"ready": True}
_DRAIN_S = 5.0  # for what a process that has ended still has in its pipe


class Worker:
    """A process that was started; its rows are handed over as they come.

    It stays in this process's group, so that whoever ends the part ends it.
    """

    def __init__(self, argv: Sequence[str], each: Callable[[Row], None], env: Mapping[str, str] | None = None) -> None:
        """Start ``python -m ARGV``."""
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (closed in wait)
        self._ready = threading.Event()
        self._process = subprocess.Popen(
            [sys.executable, "-m", *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            cwd=ROOT, env={**os.environ, **(env or {})},
        )  # fmt: skip
        # A reader of its own: grandchildren may hold the pipe open after the process was killed.
        self._reader = threading.Thread(target=self._read, args=(each,), daemon=True)
        self._reader.start()

    def tell(self, line: str) -> None:
        """Give it a line to read; one that has ended is told nothing."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def is_ready(self, seconds: float) -> bool:
        """Whether it says so, by `say_ready`, within these seconds."""
        until = time.monotonic() + seconds
        while not self._ready.is_set() and self._process.poll() is None and time.monotonic() < until:
            self._ready.wait(0.05)
        return self._ready.is_set()

    def wait(self, seconds: float) -> str:
        """Wait for its end, for ``seconds`` at most, with no more to tell it; why it failed, in one line, or ""."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        late, began = False, time.monotonic()
        try:
            self._process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            late = True
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join(_DRAIN_S)
        with self._errors as errors:
            if late:
                return f"cut off after {time.monotonic() - began:.0f} s"
            return _reason(errors, self._process.returncode) if self._process.returncode else ""

    def _read(self, each: Callable[[Row], None]) -> None:
        """Whatever a line is and whatever becomes of it, the next is read: a pipe that nobody empties stops the worker."""
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            for line in pipe:
                if not line.startswith("{"):
                    continue
                try:
                    row = json.loads(line)
                    self._ready.set() if row == READY else each(row)
                except Exception:
                    print(f"not taken: {line.strip()[:LONGEST_REASON]}", file=sys.stderr, flush=True)
                    traceback.print_exc()


def run(argv: Sequence[str], seconds: float, each: Callable[[Row], None], env: Mapping[str, str] | None = None) -> str:
    """Run ``python -m ARGV`` for ``seconds`` at most and hand each row over as it comes.

    Returns why it failed, in one line, or "".
    """
    return Worker(argv, each, env).wait(seconds)


def say_ready() -> None:
    """A worker's side: all is ready, the next line of the input says to go on."""
    hand_over(READY)


def hand_over(row: Mapping[str, Any]) -> None:
    """A worker's side: print a row."""
    print(json.dumps(row), flush=True)


def _reason(errors: IO[str], status: int) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors if line.strip()]
    print("\n".join(lines[-40:]), file=sys.stderr, flush=True)
    return f"exit status {status}: {lines[-1] if lines else 'nothing was said'}"[:LONGEST_REASON]
