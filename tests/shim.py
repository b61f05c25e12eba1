"""The shim that places faults of a disk and of the wall clock: ``faults/shim.c``, compiled where there is a compiler."""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parent / "faults" / "shim.c"
WATCH, COUNTER, AT, HOW, LOG, CLOCK = (f"FAULTS_{name}" for name in ("WATCH", "COUNTER", "AT", "HOW", "LOG", "CLOCK"))


@cache
def library() -> Path | None:
    """The shim, compiled for this process and those that it starts; None where there is no compiler, or another system."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not Path("/proc/self/fd").is_dir():
        return None
    folder = Path(tempfile.mkdtemp(prefix="fastkd-shim-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = folder / "shim.so"
    done = subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", made, SOURCE, "-ldl"], capture_output=True)
    return made if done.returncode == 0 else None


@contextmanager
def loaded() -> Iterator[None]:
    """What starts within has the shim loaded, unarmed."""
    before, shim = os.environ.get("LD_PRELOAD"), library()
    if shim is not None:
        os.environ["LD_PRELOAD"] = str(shim)
    try:
        yield
    finally:
        os.environ.pop("LD_PRELOAD", None)
        if before is not None:
            os.environ["LD_PRELOAD"] = before


def faults(*watched: Path, counter: Path, how: str = "", at: int = 0, **more: object) -> dict[str, str]:
    """The environment of a process, and of those that it starts, that has faults in the watched folders.

    Args:
        watched: folders below which operations are counted.
        counter: a file that all these processes count in; it begins at 0.
        how: kill, torn, full, eio, term, int or stop, as ``shim.c`` says; "" only counts.
        at: the operation, from 1.
        more: ``log``: a file; ``clock``: seconds.
    """
    counter.write_bytes(bytes(8))
    names = {"log": LOG, "clock": CLOCK}
    given = {names[name]: str(value) for name, value in more.items()}
    places = ":".join(str(folder.resolve()) for folder in watched)
    return {WATCH: places, COUNTER: str(counter), AT: str(at), HOW: how, "LD_PRELOAD": str(library()), **given}


def counted(counter: Path) -> int:
    """Operations so far."""
    return int.from_bytes(counter.read_bytes(), "little")


def arm(environment: Mapping[str, str]) -> None:
    """In a fork of a process with the shim: begin, if the environment asks for faults. The job is a process group then."""
    if WATCH in environment:
        os.setsid()
        ctypes.CDLL(None).faults_arm()
