"""JSON lines that tell whether one was altered, dropped, doubled or moved.

Every line ends with a ``sum``: 16 hex digits of SHA-256 over the sum of the line before and this line without its own. The
first sum goes on from the digest of all that is before it: of nothing in a new file, of lines without sums in one that an
older version began.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from fastkd.files import Record, drop_torn_line, to_line

_SUM = re.compile(rb', "sum": "([0-9a-f]{16})"\}\n\Z')


@dataclass(frozen=True)
class Chain:
    """How many lines of a file are sound from the first on, whether all are, their bytes, and the sum that the next one needs."""

    sound: int
    whole: bool
    size: int
    head: str


def whole_lines(path: Path) -> Iterator[bytes]:
    """A file's lines one by one, to its last whole line; none if there is no file."""
    if path.exists():
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))


def follow(lines: Iterable[bytes]) -> Chain:
    """Check whole lines against their sums, up to the first that does not fit."""
    sound, size, head = 0, 0, None
    before = hashlib.sha256()  # of the lines without sums
    for line in lines:
        if head is None and _SUM.search(line):
            head = before.hexdigest()[:16]
        if head is None:
            before.update(line)
        else:
            after = _after(head, line)
            if after is None:
                return Chain(sound, False, size, head)
            head = after
        sound, size = sound + 1, size + len(line)
    return Chain(sound, True, size, head or before.hexdigest()[:16])


def continued(head: str, lines: Iterable[bytes]) -> list[bytes]:
    """Of some lines those that go on from a sum, one after the other; what is between them is passed over."""
    kept: list[bytes] = []
    for line in lines:
        after = _after(head, line)
        if after is not None:
            kept.append(line)
            head = after
    return kept


def link(head: str, record: Record) -> tuple[bytes, str]:
    """A record as the line that goes on from a sum, and its own sum."""
    body = to_line(record).rstrip().encode()
    own = _digest(head.encode() + body)
    return body[:-1] + f', "sum": "{own}"}}\n'.encode(), own


def append(path: Path, record: Record) -> None:
    """Add a line to a file that other processes may append to as well. One of an older version stays without sums."""
    with FileLock(path.with_name(f".lock-{path.name}")):  # a line goes on from the one that is the last by then
        drop_torn_line(path)
        last = b"".join(deque(whole_lines(path), maxlen=1))
        found = _SUM.search(last)
        with path.open("ab") as file:
            if last and not found:
                file.write(to_line(record).encode())
            else:
                file.write(link(found[1].decode() if found else _digest(b""), record)[0])


def _after(head: str, line: bytes) -> str | None:
    """The sum of a line; None if it has none that goes on from ``head``."""
    found = _SUM.search(line)
    fits = found and found[1].decode() == _digest(head.encode() + line[: found.start()] + b"}")
    return found[1].decode() if found and fits else None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
