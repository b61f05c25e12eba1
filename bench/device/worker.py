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
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from bench.device.part import Row

ROOT = Path(__file__).parents[2]
LONGEST_REASON = 300  # characters
_DRAIN_S = 5.0  # for what a process that has ended still has in its pipe


def run(argv: Sequence[str], seconds: float, each: Callable[[Row], None], env: Mapping[str, str] | None = None) -> str:
    """Run ``python -m ARGV`` for ``seconds`` at most and hand each row over as it comes.

    Returns why it failed, in one line, or "". It stays in this process's group, so that whoever ends the part ends it.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *argv], stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
        # A reader of its own: grandchildren may hold the pipe open after the process was killed.
        reader = threading.Thread(target=_read, args=(process.stdout, each), daemon=True)
        reader.start()
        late = False
        try:
            process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            late = True
        finally:
            process.kill()
            process.wait()
            reader.join(_DRAIN_S)
        if late:
            return f"cut off after {seconds:.0f} s"
        return _reason(errors, process.returncode) if process.returncode else ""


def hand_over(row: Mapping[str, Any]) -> None:
    """A worker's side: print a row."""
    print(json.dumps(row), flush=True)


def _read(pipe: IO[str], each: Callable[[Row], None]) -> None:
    """Whatever a line is and whatever becomes of it, the next is read: a pipe that nobody empties stops the worker."""
    with pipe:
        for line in pipe:
            if not line.startswith("{"):
                continue
            try:
                each(json.loads(line))
            except Exception:
                print(f"not taken: {line.strip()[:LONGEST_REASON]}", file=sys.stderr, flush=True)
                traceback.print_exc()


def _reason(errors: IO[str], status: int) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors if line.strip()]
    print("\n".join(lines[-40:]), file=sys.stderr, flush=True)
    return f"exit status {status}: {lines[-1] if lines else 'nothing was said'}"[:LONGEST_REASON]
