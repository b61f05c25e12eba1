"""Local files as sources: a large text is cut in blocks, a parquet file in row groups; a .gz is one unit."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from fastkd.data import contents
from fastkd.data.access import opened, readable
from fastkd.data.lines import Block
from fastkd.data.order import shuffled
from fastkd.data.parquet import RowGroup, row_groups
from fastkd.data.walk import kind_of

BLOCK = 2**20  # bytes: so that few MB of a large text are many places of it
PROBE = 2**16  # bytes that are read at each place of a file that is not hashed whole


@dataclass(frozen=True)
class LocalFile:
    """One file of a corpus. Raises ``ValueError`` for what is wrong in it, naming the file and the line."""

    path: Path
    lines: bool = False  # each line of a .txt is a document
    probes: int | None = None  # places to hash, with the size, instead of all bytes, where that is less
    block: int = BLOCK

    @property
    def size(self) -> int:
        """Bytes of the file."""
        with readable(self.path):
            return self.path.stat().st_size

    def identity(self) -> dict[str, str]:
        """The sha256 of its content and how that is read, wherever the file is."""
        with readable(self.path):
            stat = self.path.stat()
            probes = self.probes if self.probes and self.probes * PROBE < stat.st_size else None
            digest = _sha256(self.path, stat.st_size, stat.st_mtime_ns, probes)
        whole = {"kind": str(kind_of(self.path)), "sha256": digest}
        return whole if probes is None else whole | {"size": str(stat.st_size), "places": str(probes)}

    def units(self) -> Iterator[Block | RowGroup]:
        """Yield its parts in an order drawn for its content."""
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
    """Of a file's bytes, or of its size and some places; ``changed_ns`` is there so that a changed file is read again."""
    with open(path, "rb") as file:
        if probes is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for number in range(probes):
            file.seek((size - PROBE) * number // (probes - 1))
            digest.update(file.read(PROBE))
        return digest.hexdigest()
