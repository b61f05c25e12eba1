"""What every part of the suite is given, and where its rows go.

A part is a module of this folder with

    SECONDS   how long it may take in a run of ten minutes
    run       (context, rows): measures, and hands each row over as soon as it has it
    markdown  (list of rows) → its table; may be called with the rows of a part that was cut off

and, where a picture helps, ``draw(rows, path)``. It runs in a process of its own, so that whatever happens to it the
other parts still come:

    python -m bench.device.part PACKAGE CONTEXT [--show]      (--show: table and picture of the rows that are there)
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fastkd import files

Row = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """What a part is given."""

    part: str  # its module's name
    out: str  # the folder of the results
    device: str  # cuda or cpu
    seconds: float  # after which it is cut off
    tiny: bool  # sizes for a rehearsal without a GPU
    bundle: str | None = None  # an unpacked archive of ``bench.bundle``: teacher/, shards/ and, if given, glue/
    scratch: str | None = None  # a folder that the parts of a run share

    def dump(self) -> str:
        """For a command line; ``Context(**json.loads(…))`` reads it."""
        return json.dumps(dataclasses.asdict(self))

    def path(self, suffix: str) -> Path:
        """The part's file in the folder of the results: ``context.path(".md")``."""
        return Path(self.out) / f"{self.part}{suffix}"


class Recorder:
    """A part's rows: one JSON object a line in ``OUT/<part>.jsonl``, on the disk before the next is measured."""

    def __init__(self, context: Context, started: float | None = None) -> None:
        """``started``: of the process, on the monotonic clock; default now."""
        self.context, self._started = context, time.monotonic() if started is None else started
        self.path = context.path(".jsonl")
        self.path.write_text("")

    @property
    def left(self) -> float:
        """Seconds until the part is cut off."""
        return self.context.seconds - (time.monotonic() - self._started)

    def add(self, **row: Any) -> None:
        """Write a row and show it. A number that is not finite becomes null."""
        line = files.to_line(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        print(line, end="", flush=True)


def read(path: Path | str) -> list[Row]:
    """The rows of a file, none where it is missing; a last line that was torn by a kill is left out."""
    return files.read_jsonl(Path(path))


def in_one_line(error: BaseException) -> str:
    """An exception's kind and the first line of what it says, for a row's ``error``."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


def show(module: ModuleType, context: Context) -> None:
    """Write the table of the rows so far, and the picture if the part draws one."""
    rows = read(context.path(".jsonl"))
    with _told():
        files.write(context.path(".md"), module.markdown(rows))
    if hasattr(module, "draw"):
        with _told():
            module.draw(rows, context.path(".png"))


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """An error is printed and ignored: a table that fails must not cost the picture, and neither may cost the rows."""
    try:
        yield
    except Exception:
        traceback.print_exc()


def main(argv: list[str]) -> None:
    """Run the part of a context, or only show it again."""
    if hasattr(faulthandler, "register"):  # where it hung is seen in its log
        faulthandler.register(signal.SIGTERM, all_threads=True, chain=True)
    started, package, context = time.monotonic(), argv[0], Context(**json.loads(argv[1]))
    module = importlib.import_module(f"{package}.{context.part}")
    if "--show" in argv:
        show(module, context)
        return
    try:
        module.run(context, Recorder(context, started))
    finally:
        show(module, context)


if __name__ == "__main__":
    main(sys.argv[1:])
