"""JSON-lines files of a run folder: written line by line, read after a kill, cut at a resume."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastkd import atomic

Record = dict[str, Any]


def read_jsonl(path: Path) -> list[Record]:
    """The objects of a JSON-lines file, `[]` where there is none.

    A process that is killed while it writes leaves a torn last line; that line is left out.

    Raises:
        ValueError: a line before the last is no JSON object.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records: list[Record] = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif any(rest.strip() for rest in lines[i + 1 :]):
            raise ValueError(f"{path}:{i + 1} is no JSON object: restore the file or start a new run folder")
    return records


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def drop_torn_line(path: Path) -> None:
    """Cuts off a last line without an end, as a kill leaves it, so that what is appended has its own."""
    if path.exists():
        with path.open("rb+") as file:
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)


def cut_jsonl(path: Path, keep: Callable[[Record], bool]) -> None:
    """Rewrites a JSON-lines file with the records that `keep` accepts, atomically: all or nothing happens."""
    kept = [record for record in read_jsonl(path) if keep(record)]
    atomic.write(path, "".join(to_line(record) for record in kept))
    atomic.sync(path.parent)


def to_line(record: Mapping[str, Any]) -> str:
    """One line of strict JSON; numbers that are not finite become null, which strict JSON has no word for."""
    return json.dumps(finite(record), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """A JSON value with null for each number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
