"""JSON lines that tell whether one was altered, dropped, doubled or moved.

Every line ends with a ``sum``: 16 hex digits of SHA-256 over the sum of the line before and this line without its own. The
first sum goes on from the digest of all that is before it: of nothing in a new file, of lines without sums in one that an
older version began.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from fastkd.files import Record, drop_torn_line, to_line

_SUM = re.compile(rb', "sum": "([0-9a-f]{16})"\}\n\Z')


@dataclass(frozen=True)
class Chain:
    """The lines of a file, how many of them are sound from the first on, and the sum that the next line goes on from."""

    lines: list[bytes]
    sound: int
    head: str


def whole_lines(path: Path) -> bytes:
    """A file's content to the end of its last whole line; nothing if there is no file."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def follow(content: bytes) -> Chain:
    """Check whole lines against their sums, up to the first that does not fit."""
    lines = [line + b"\n" for line in content.split(b"\n")[:-1]]
    first = next((i for i, line in enumerate(lines) if _SUM.search(line)), len(lines))
    head = _digest(b"".join(lines[:first]))
    for i, line in enumerate(lines[first:], start=first):
        after = _after(head, line)
        if after is None:
            return Chain(lines, i, head)
        head = after
    return Chain(lines, len(lines), head)


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
        *_, last = [b"", *whole_lines(path).splitlines(keepends=True)]
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
