"""Row groups of parquet files on the hub. Only footers and the text's column are read, each by one request.

``datasets`` reads row groups too (``reshard``), but asks for three times their bytes: it reads ahead in the file, where
the next row group of a shuffled order is not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

from fastkd.data import hub_requests
from fastkd.data.background import begin
from fastkd.data.order import shuffled
from fastkd.data.parquet import values
from fastkd.data.rows import text_of

POOL = 16  # files whose row groups are shuffled together: their footers are read before the first row, and held
TAIL = 1 << 18  # bytes of a file's end that hold most footers
ROWS = 1024  # that are decoded at once
UNCOUNTED = 100  # bytes after a column that may be its own: writers of 2013 did not count a header
AHEAD = 8  # row groups that are read while one is tokenised: an answer takes its time, however fast the line
AHEAD_BYTES = 64 << 20  # of these, at most; a larger one is read by itself, piece by piece

Ask = Callable[[Callable[[], Any]], Any]
Pieces = dict[tuple[int, int], bytes]  # of a file: what is from a byte to before another


def row_groups(files: Sequence[tuple[str, int]], dataset: str, ask: Ask) -> Iterator[RowGroup]:
    """Yield the row groups of files (address, bytes) in a drawn order, ``POOL`` files at a time.

    Only the footers of the files up to the one that is asked for are read. ``ask`` calls what asks the hub.
    """
    for first in range(0, len(files), POOL):
        some = files[first : first + POOL]
        questions = [partial(ask, partial(_tail, *file)) for file in some]
        tails = [questions[0]()]  # the library asks for the commit once, unless many threads begin
        tails += [future.result() for future in [begin(question) for question in questions[1:]]]
        footers = [ask(partial(_footer, tail)) for tail in tails]
        groups = [
            group for file, footer in zip(some, footers, strict=True) for group in _of(*file, footer, dataset, ask)
        ]
        order = [groups[number] for number in shuffled(len(groups), dataset, first)]
        window = Window(order)
        for place, group in enumerate(order):
            yield RowGroup(group, window, place)


@dataclass(frozen=True)
class Stored:
    """Where a row group is."""

    path: str  # hf://…
    file_size: int  # bytes
    number: int
    first: int  # row of the file, from 0
    size: int  # bytes of the file that are counted as its own
    footer: Any
    dataset: str
    ask: Ask

    @property
    def bytes(self) -> int:
        """All its columns as stored."""
        group = self.footer.row_group(self.number)
        return sum(group.column(number).total_compressed_size for number in range(group.num_columns))

    def column(self, text_field: str) -> Pieces:
        """The text's column as stored, by one request."""
        return self.ask(lambda: self._column(text_field))

    def _column(self, text_field: str) -> Pieces:
        group = self.footer.row_group(self.number)
        chunks = [group.column(number) for number in range(group.num_columns)]
        pieces = {}
        with _opened(self.path, self.file_size, cache_type="none") as file:
            for chunk in chunks:
                if f"{chunk.path_in_schema}.".startswith(f"{text_field}."):  # a name may hold dots itself
                    first = min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
                    file.seek(first)
                    piece = bytes(file.read(chunk.total_compressed_size + UNCOUNTED))
                    pieces[first, first + len(piece)] = piece
        return pieces

    def decoded(self, pieces: Pieces, text_field: str) -> Iterator[Any]:
        """What ``column`` returned, as Arrow."""

        def batches() -> Iterator[Any]:
            return self._batches(text_field, cache_type="parts", cache_options={"data": dict(pieces), "strict": True})

        return hub_requests.resumed(batches, self.ask)

    def batches(self, text_field: str) -> Iterator[Any]:
        """The text's column, as Arrow, read in pieces of the file."""
        return hub_requests.resumed(lambda: self._batches(text_field, cache_type="readahead"), self.ask)

    def _batches(self, text_field: str, **cache: Any) -> Iterator[Any]:
        import pyarrow.parquet

        with _opened(self.path, self.file_size, **cache) as file:
            # No thread of Arrow's reads: the caller's does, which Ctrl-C reaches.
            reader = pyarrow.parquet.ParquetFile(_plain(file), metadata=self.footer, pre_buffer=False)
            for batch in reader.iter_batches(ROWS, row_groups=[self.number], columns=[text_field], use_threads=False):
                yield batch.column(0)


@dataclass(frozen=True)
class RowGroup:
    """Rows of a parquet file that are stored together, and their place in the order of reading."""

    stored: Stored
    window: Window
    place: int

    @property
    def name(self) -> str:
        """The file's path in the repository and the row group's number, from 0."""
        return f"{self.stored.path.partition('@')[2].partition('/')[2]} row group {self.stored.number}"

    @property
    def size(self) -> int:
        """Bytes of the file that are counted as its own: those of all row groups are the file's."""
        return self.stored.size

    def documents(self, text_field: str) -> Iterator[str]:
        """Yield the rows' text in order, blank ones left out. Raises ``ValueError`` that names file, column and row."""
        columns = self.stored.footer.schema.to_arrow_schema().names
        where = f"corpus {self.stored.dataset!r}: {self.stored.path.partition('@')[2].partition('/')[2]}"
        if text_field not in columns:
            raise ValueError(f"{where}: no column {text_field!r}; it has {columns}: name one with --text-field")
        row = self.stored.first
        for batch in self.window.read(self.place, text_field):
            for value in values(batch, f"{where}: column {text_field!r}", row):
                if text := text_of({text_field: value}, text_field, where):
                    yield text
            row += len(batch)


class Window:
    """Row groups in their order of reading: those after the one that is read are read meanwhile."""

    def __init__(self, order: Sequence[Stored]) -> None:
        self._order = order
        self._columns: dict[tuple[int, str], Future[Pieces]] = {}
        self._lock = threading.Lock()

    def read(self, place: int, text_field: str) -> Iterator[Any]:
        """Yield a row group's column in pieces; with the second piece, or the end, the next ones are asked for."""
        with self._lock:
            known = self._columns.pop((place, text_field), None)
        stored = self._order[place]
        if known is None and stored.bytes > AHEAD_BYTES:
            yield from stored.batches(text_field)
            return
        known = known or begin(partial(stored.column, text_field))
        batches = stored.decoded(known.result(), text_field)
        for batch in islice(batches, 1):
            yield batch.slice(0, 1)  # who checks a corpus takes no more than one
            self._begin(place + 1, text_field)
            yield batch.slice(1)
        yield from batches

    def _begin(self, place: int, text_field: str) -> None:
        """Have the next row groups read, as many as there is room for."""
        size = 0
        for following in range(place, min(place + AHEAD, len(self._order))):
            size += self._order[following].bytes
            if size > AHEAD_BYTES:
                return
            with self._lock:
                if (following, text_field) not in self._columns:
                    work = partial(self._order[following].column, text_field)
                    self._columns[following, text_field] = begin(work)


def _tail(path: str, size: int) -> bytes:
    """A file's end, with all of its footer."""
    with _opened(path, size, cache_type="none") as file:
        tail = _end(file, min(TAIL, size))
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if len(tail) < length <= size:
            tail = _end(file, length)
    return tail


def _footer(tail: bytes) -> Any:
    """The footer, by pyarrow: not in a thread of ``begin``, which the end of the process may find there."""
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(pyarrow.BufferReader(tail))


def _end(file: Any, length: int) -> bytes:
    file.seek(file.size - length)
    return bytes(file.read(length))


def _of(path: str, size: int, footer: Any, dataset: str, ask: Ask) -> Iterator[Stored]:
    """The row groups of a file."""
    total, row = footer.num_row_groups, 0
    for number in range(total):
        share = size * (number + 1) // total - size * number // total
        yield Stored(path, size, number, row, share, footer, dataset, ask)
        row += footer.row_group(number).num_rows


def _opened(path: str, size: int, **cache: Any) -> AbstractContextManager[Any]:
    """A file that is read by ranges, with a cache of fsspec's."""
    known = {"size": size} if size else {}
    return _files(path.partition("://")[0]).open(path, "rb", **cache, **known)


def _plain(file: Any) -> Any:
    """A file for pyarrow, which loses a Ctrl-C that comes while Python code says whether the file is closed."""
    return SimpleNamespace(closed=False, mode="rb", read=file.read, seek=file.seek, tell=file.tell)


@cache
def _files(protocol: str) -> Any:
    """One file system for all threads: its library gives each thread a copy, with the listings of all files."""
    import fsspec  # type: ignore[import-untyped]

    return fsspec.filesystem(protocol, skip_instance_cache=True)
