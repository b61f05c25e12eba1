"""Local files as sources of text: a .txt or .jsonl is read in blocks, a parquet file in row groups, a .gz as a whole.

In a .txt, documents are separated by blank lines; in a .jsonl, each line is one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, takewhile
from pathlib import Path
from sys import maxsize
from typing import Any, BinaryIO, NamedTuple

from fastkd.data import contents
from fastkd.data.contents import opened, readable
from fastkd.data.order import shuffled
from fastkd.data.parquet import RowGroup, row_groups
from fastkd.data.rows import text_of
from fastkd.data.walk import kind_of

BLOCK = 2**20  # bytes of a block: small, so that a few MB of a large text come from many places of it
PROBE = 2**16  # bytes that are read at each place of a file that is not hashed whole
READ = 2**20  # bytes that are decoded at once


@dataclass(frozen=True)
class LocalFile:
    """One file of a corpus. Raises ``ValueError`` for what is wrong in it, naming the file and the line."""

    path: Path
    lines: bool = False  # each line of a .txt is a document
    probes: int | None = None  # hash this many places and the size, where that is less than all bytes
    block: int = BLOCK

    @property
    def size(self) -> int:
        """Bytes of the file."""
        with readable(self.path):
            return self.path.stat().st_size

    def identity(self) -> dict[str, str]:
        """The SHA-256 of its content and its kind; the path is not part of it."""
        with readable(self.path):
            stat = self.path.stat()
            probes = self.probes if self.probes and self.probes * PROBE < stat.st_size else None
            digest = _sha256(self.path, stat.st_size, stat.st_mtime_ns, probes)
        whole = {"kind": str(kind_of(self.path)), "sha256": digest}
        return whole if probes is None else whole | {"size": str(stat.st_size), "places": str(probes)}

    def units(self) -> Iterator[Block | RowGroup]:
        """Yield its blocks or row groups in an order drawn from its content's hash."""
        parts = self._parts()
        for number in shuffled(len(parts), self.identity()["sha256"]):
            yield parts[number]

    def _parts(self) -> list[Block] | list[RowGroup]:
        kind, size = str(kind_of(self.path)), self.size
        self._require_text(kind)
        if kind == ".parquet":
            return row_groups(self.path, size)
        if kind.endswith(".gz"):
            return [Block(self.path, kind, size, lines=self.lines)]
        count = -(-size // self.block)
        # Equal blocks, up to rounding: bound k is ⌊size · k / count⌋, so the last one is exactly the size.
        bounds = [size * number // count for number in range(count)] + [size]
        return [Block(self.path, kind, end - start, start, end, self.lines) for start, end in pairwise(bounds)]

    def _require_text(self, kind: str) -> None:
        with readable(self.path), opened(self.path) as file:
            head = file.read(contents.HEAD)
        if kind == ".parquet" and head.startswith(b"PAR1"):
            return
        if (found := contents.describe(head, self.path)) is not None:
            raise ValueError(f"corpus file {str(self.path)!r} {found}")


@cache
def _sha256(path: Path, size: int, changed_ns: int, probes: int | None) -> str:
    """SHA-256 of a file, or of its size and ``probes`` places. ``changed_ns`` makes the cache read a changed file again."""
    with open(path, "rb") as file:
        if probes is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for number in range(probes):
            file.seek((size - PROBE) * number // (probes - 1))
            digest.update(file.read(PROBE))
        return digest.hexdigest()


@dataclass(frozen=True)
class Block:
    """A range of bytes of a file: it holds the lines that begin in it.

    A document of a .txt begins after a blank line, and belongs to the block in which that blank line begins. So each
    document is in exactly one block, wherever the borders are.
    """

    path: Path
    kind: str  # a suffix of walk.SUFFIXES
    size: int  # bytes as stored
    start: int = 0
    end: int = maxsize  # exclusive
    lines: bool = False  # each line of a .txt is a document

    @property
    def name(self) -> str:
        """The file's name, and where the block begins."""
        return f"{self.path.name} from byte {self.start}" if self.start else self.path.name

    def documents(self, text_field: str) -> Iterator[str]:
        """Yield the documents in order, blank ones left out. Raises ``ValueError`` that names file and line."""
        with readable(self.path), opened(self.path) as file:
            if self.kind.startswith(".jsonl"):
                yield from self._rows(file, text_field)
            elif self.lines:
                yield from (line for _, lines in self._own_lines(file) for line in lines if line)
            else:
                yield from self._paragraphs(file)

    def _own_lines(self, file: BinaryIO) -> Iterator[tuple[int, list[str]]]:
        """Yield (position of the first line, stripped lines), many lines at once: those that begin in the block."""
        position = max(self.start - 1, 0)
        if self.start:  # skip the end of the line before; if that line fills the whole block, no line begins here
            file.seek(position)
            before = file.readline(self.end - position)
            position = position + len(before) if before.endswith(b"\n") else self.end
        while position < self.end and (data := file.read(min(READ, self.end - position))):
            if not data.endswith(b"\n"):
                data += file.readline()
            yield position, self._lines(position, data)
            position += len(data)

    def _lines(self, position: int, data: bytes) -> list[str]:
        if contents.ZEROS in data:
            line, _ = _line_at(data, data.index(contents.ZEROS))
            raise ValueError(f"{Place(self.path, position, line)}: {contents.ZERO_BYTES}")
        try:
            lines = data.decode("utf-8" if position else "utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise _not_utf8(self.path, position, data, error) from error
        if not lines[-1]:
            lines.pop()  # split() gives one more, empty, after the last line's end
        return [line.strip() for line in lines]

    def _paragraphs(self, file: BinaryIO) -> Iterator[str]:
        document: list[str] = []
        mine = self.start == 0  # whether a blank line of this block came before, or the file begins here
        for _, lines in self._own_lines(file):
            for line in lines:
                if line:
                    if mine:
                        document.append(line)
                else:
                    mine = True
                    if document:
                        yield "\n".join(document)
                        document = []
        if mine:  # the last document may go on in the next block, or begin there after this block's last blank line
            document += takewhile(bool, self._lines_after(file))
        if document:
            yield "\n".join(document)

    def _lines_after(self, file: BinaryIO) -> Iterator[str]:
        position = file.tell()
        for data in file:
            yield from self._lines(position, data)
            position += len(data)

    def _rows(self, file: BinaryIO, text_field: str) -> Iterator[str]:
        for position, lines in self._own_lines(file):
            for number, line in enumerate(lines):
                if line:
                    where = Place(self.path, position, number)
                    if text := text_of(_parsed(line, where), text_field, where):
                        yield text


class Place(NamedTuple):
    """Where a line is. Its number is counted only when a message needs it: that reads the file again."""

    path: Path
    position: int  # bytes before some earlier line
    lines: int  # from that line to this one

    def __str__(self) -> str:
        number, left = self.lines + 1, self.position
        with opened(self.path) as file:
            while left and (data := file.read(min(left, READ))):
                number += data.count(b"\n")
                left -= len(data)
        return f"{self.path}:{number}"


def _parsed(line: str, where: Place) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = ", such as `jq -c '.[]'` makes of an array" if line.startswith("[") else ""
        raise ValueError(f"{where}: not a JSON object ({error}): one object per line is read{hint}") from error


def _not_utf8(path: Path, position: int, data: bytes, error: UnicodeDecodeError) -> ValueError:
    """The error for a byte that is not UTF-8, with a guess at the encoding.

    0x80 to 0x9f are control characters in Latin-1, letters and quotes in Windows' CP1252.
    """
    line, column = _line_at(data, error.start)
    where = f"{Place(path, position, line)}: not UTF-8 (byte 0x{data[error.start]:02x} at column {column})"
    if error.reason == "unexpected end of data":
        return ValueError(f"{where}: it ends within a character, as a download that broke off does: copy it again")
    encoding = "CP1252" if any(0x80 <= byte < 0xA0 for byte in data) else "LATIN1"
    convert = contents.iconv(path, encoding)
    return ValueError(f"{where}: convert the file, for instance with {convert} (`file -i` guesses its encoding)")


def _line_at(data: bytes, offset: int) -> tuple[int, int]:
    """The line of a byte, from 0, and its column there, from 1."""
    return data.count(b"\n", 0, offset), offset - data.rfind(b"\n", 0, offset)
