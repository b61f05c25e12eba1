"""Row groups of parquet files on the hub. Only footers and the text's column are read, each by one request.

``datasets`` reads row groups too (``reshard``), but asks for three times their bytes: it reads ahead in the file, though
the next row group of a shuffled order is elsewhere.
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
from fastkd.data.hub_requests import begin
from fastkd.data.order import shuffled
from fastkd.data.rows import text_of, values

POOL = 16  # files whose row groups are shuffled together; their footers are read before the first row, and kept
TAIL = 1 << 18  # bytes of a file's end that are read first: most footers fit
ROWS = 1024  # that are decoded at once
UNCOUNTED = 100  # bytes read past a column's stated end: writers of 2013 did not count a page header
AHEAD = 8  # row groups that are read while one is tokenised: an answer takes time, however fast the line
AHEAD_BYTES = 64 << 20  # of these row groups, at most; a larger one is read by itself, in pieces

Ask = Callable[[Callable[[], Any]], Any]
Pieces = dict[tuple[int, int], bytes]  # (first byte, byte after the last) of a file: its content


def row_groups(files: Sequence[tuple[str, int]], dataset: str, ask: Ask) -> Iterator[HubRowGroup]:
    """Yield the row groups of files (address, bytes) in a drawn order, ``POOL`` files at a time.

    Footers are read only up to the file that is asked for. ``ask`` calls a function that makes a request.
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
            yield HubRowGroup(group, window, place)


@dataclass(frozen=True)
class Stored:
    """A row group of a file on the hub: where it is, and how its bytes are fetched and decoded."""

    path: str  # hf://…
    file_size: int  # bytes
    number: int
    first: int  # row of the file, from 0
    size: int  # bytes: an equal share of the file
    footer: Any
    dataset: str
    ask: Ask

    @property
    def bytes(self) -> int:
        """Bytes of all its columns as stored."""
        group = self.footer.row_group(self.number)
        return sum(group.column(number).total_compressed_size for number in range(group.num_columns))

    def column(self, text_field: str) -> Pieces:
        """Fetch the text's column as stored, by one request."""
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
        """Decode what ``column`` returned to Arrow."""

        def batches() -> Iterator[Any]:
            return self._batches(text_field, cache_type="parts", cache_options={"data": dict(pieces), "strict": True})

        return hub_requests.resumed(batches, self.ask)

    def batches(self, text_field: str) -> Iterator[Any]:
        """Fetch and decode the text's column piece by piece."""
        return hub_requests.resumed(lambda: self._batches(text_field, cache_type="readahead"), self.ask)

    def _batches(self, text_field: str, **cache: Any) -> Iterator[Any]:
        import pyarrow.parquet

        with _opened(self.path, self.file_size, **cache) as file:
            # No thread of Arrow's reads: the caller's does, which Ctrl-C reaches.
            reader = pyarrow.parquet.ParquetFile(_plain(file), metadata=self.footer, pre_buffer=False)
            for batch in reader.iter_batches(ROWS, row_groups=[self.number], columns=[text_field], use_threads=False):
                yield batch.column(0)


@dataclass(frozen=True)
class HubRowGroup:
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
        """Bytes: an equal share of the file; those of all its row groups add up to the file's size."""
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
    """Row groups in their order of reading; while one is decoded, threads fetch the next ones."""

    def __init__(self, order: Sequence[Stored]) -> None:
        self._order = order
        self._columns: dict[tuple[int, str], Future[Pieces]] = {}
        self._lock = threading.Lock()

    def read(self, place: int, text_field: str) -> Iterator[Any]:
        """Yield a row group's column in pieces. When the second piece, or the end, is asked for, the next ones are fetched."""
        with self._lock:
            known = self._columns.pop((place, text_field), None)
        stored = self._order[place]
        if known is None and stored.bytes > AHEAD_BYTES:
            yield from stored.batches(text_field)
            return
        known = known or begin(partial(stored.column, text_field))
        batches = stored.decoded(known.result(), text_field)
        for batch in islice(batches, 1):
            yield batch.slice(0, 1)  # a check of a corpus takes one row and must fetch no more
            self._begin(place + 1, text_field)
            yield batch.slice(1)
        yield from batches

    def _begin(self, place: int, text_field: str) -> None:
        """Begin to fetch the next row groups, as many as there is room for."""
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
    """A file's end, with its whole footer."""
    with _opened(path, size, cache_type="none") as file:
        tail = _end(file, min(TAIL, size))
        # A parquet file ends with: footer, its length (4 bytes), PAR1.
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if len(tail) < length <= size:
            tail = _end(file, length)
    return tail


def _footer(tail: bytes) -> Any:
    """The footer, read by pyarrow. Not in a thread of ``begin``: the process must not end while one is inside pyarrow."""
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
    """Open a file of which ranges are read, with one of fsspec's caches."""
    known = {"size": size} if size else {}
    return _files(path.partition("://")[0]).open(path, "rb", **cache, **known)


def _plain(file: Any) -> Any:
    """A file for pyarrow. Its ``closed`` runs no Python code: pyarrow loses a Ctrl-C that comes during that."""
    return SimpleNamespace(closed=False, mode="rb", read=file.read, seek=file.seek, tell=file.tell)


@cache
def _files(protocol: str) -> Any:
    """One file system for all threads: fsspec would make a copy for each, with its own listings of all files."""
    import fsspec  # type: ignore[import-untyped]

    return fsspec.filesystem(protocol, skip_instance_cache=True)
