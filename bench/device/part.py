"""What every part of the suite is given, and where its rows go.

A part is a module of this folder with

    SECONDS   how long it may take in a run of ten minutes
    run       (context, rows): measures, and hands each row over as soon as it has it
    markdown  (list of rows) → its table; may be called with the rows of a part that was cut off

and, where a picture helps, ``draw(rows, path)``. It runs in a process of its own, so that whatever happens to it the
other parts still come.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """What a part is given."""

    part: str  # its module's name
    out: str  # the folder of the results
    device: str  # cuda or cpu
    seconds: float  # after which it is cut off; it had better be done
    tiny: bool  # sizes for a rehearsal without a GPU
    bundle: str | None = None  # an unpacked archive of ``bench.bundle``: teacher/, shards/ and, if given, glue/

    def dump(self) -> str:
        """For a command line; ``Context(**json.loads(…))`` reads it."""
        return json.dumps(dataclasses.asdict(self))


class Rows:
    """A part's rows: one JSON object a line in ``OUT/<part>.jsonl``, on the disk before the next is measured."""

    def __init__(self, context: Context) -> None:
        self.context, self._started = context, time.monotonic()
        self.path = Path(context.out) / f"{context.part}.jsonl"
        self.path.write_text("")

    @property
    def left(self) -> float:
        """Seconds until the part is cut off."""
        return self.context.seconds - (time.monotonic() - self._started)

    def add(self, **row: Any) -> None:
        """Write a row and show it."""
        line = json.dumps(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line, flush=True)
