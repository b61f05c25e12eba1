"""Documents from the lines of a .txt (blank lines between documents) or .jsonl, block by block."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from sys import maxsize
from typing import Any, BinaryIO, NamedTuple

from fastkd.data import contents
from fastkd.data.access import opened, readable
from fastkd.data.rows import text_of

READ = 2**20  # bytes that are decoded at once


@dataclass(frozen=True)
class Block:
    """A range of bytes of a file.

    It holds the lines that begin in it. A document of a .txt begins after a blank line, and is in the block where that
    line begins: so each document is in one block, wherever the borders are.
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
        """Yield the stripped lines that begin in the block, many at once, each time with the first one's position."""
        position = max(self.start - 1, 0)
        if self.start:  # the line before: where it goes on to the end of the block, none begins here
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
            lines.pop()  # what follows the last line's end
        return [line.strip() for line in lines]

    def _paragraphs(self, file: BinaryIO) -> Iterator[str]:
        document: list[str] = []
        mine = self.start == 0
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
        if mine:  # the last document may go on past the block, or follow the block's last blank line
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
    """Where a line is; its number in the file is counted only for a message."""

    path: Path
    position: int  # of a line before it
    lines: int  # between that and this

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
    """What to do about a byte. Latin-1 has control characters at 0x80 to 0x9f, Windows has letters and quotes there."""
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
